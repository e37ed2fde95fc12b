"""The experts as Megatron-Core modules, for `MoESubmodules.experts` of a layer spec:

    spec = get_gpt_layer_local_spec(num_experts=128, ...)
    use_experts(spec, "grouped")

They answer what Megatron's TEGroupedMLP and SequentialMLP answer. All experts of a rank are one parameter for each
linear, `linear_fc1.weight` [L, 2 * F, H] and `linear_fc2.weight` [L, H, F], because grouped GEMMs read them so. In
distributed checkpoints they are saved expert by expert under Megatron's own keys, so any of these classes, and
Megatron's two, can read what another wrote.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule

from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.experts.checkpoint import ExpertShards
from megatron_ep_v2.experts.gemm import gemm
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import swiglu_experts


class Experts(MegatronModule):  # type: ignore[misc]
    """SwiGLU experts. Use a subclass, which names the backend.

    Args:
        num_local_experts: L.
        config: Megatron's TransformerConfig.
        submodules: Not used: the linears are this module's own.
        pg_collection: Megatron's process groups; `ep`, `expt_tp` and `expt_dp` are used.
        name: Megatron's, from 0.19 on; not used.

    Raises:
        SettingsError: The configuration asks for experts that these are not.
        UnavailableError: The backend cannot run here.
    """

    backend: str

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any = None,
        pg_collection: Any = None,
        name: str | None = None,
    ):
        super().__init__(config=config)
        _check(config, pg_collection)
        self.num_local_experts = num_local_experts
        self.ep_group, self.dp_group = pg_collection.ep, pg_collection.expt_dp
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size or config.ffn_hidden_size
        self.linear_fc1 = _StackedLinear(config, num_local_experts, 2 * ffn, hidden)
        self.linear_fc2 = _StackedLinear(config, num_local_experts, hidden, ffn)
        for linear in (self.linear_fc1, self.linear_fc2):
            if not config.use_cpu_initialization:  # else the first forward finds out, where the weights are then
                gemm(self.backend).check(linear.weight.new_empty(0, linear.weight.shape[2]), linear.weight)
        if config.perform_initialization:
            first, number = self.ep_group.rank() * num_local_experts, self.ep_group.size() * num_local_experts
            with _random(config):
                self.linear_fc1.initialize(config.init_method, first, number)
                self.linear_fc2.initialize(config.output_layer_init_method, first, number)

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """
        Args:
            permuted_local_hidden_states: [P, H], sorted by local expert.
            tokens_per_expert: [L] integers, rows of each expert, padding counted. On the CPU they add up to P; on the
                GPU to P at most, and the host does not wait for them (the sequential experts do).
            permuted_probs: [P].

        Returns:
            [P, H] weighted by the probabilities, and None: no bias.
        """
        groups = Groups.from_counts(tokens_per_expert, permuted_local_hidden_states)
        return self.on_groups(permuted_local_hidden_states, permuted_probs, groups), None

    def on_groups(self, rows: torch.Tensor, probs: torch.Tensor, groups: Groups) -> torch.Tensor:
        """`forward` for rows whose groups are known better than counts can tell, e.g. `Groups.from_places`."""
        return swiglu_experts(rows, probs, self.linear_fc1.weight, self.linear_fc2.weight, groups, self.backend)

    def backward_dw(self) -> None:
        """Nothing is left to do: weights' gradients are computed in backward."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints; see the module's docstring."""
        linears = {"linear_fc1": self.linear_fc1, "linear_fc2": self.linear_fc2}
        shards = ExpertShards(
            first=self.ep_group.rank() * self.num_local_experts,
            number=self.ep_group.size() * self.num_local_experts,
            offsets=tuple(sharded_offsets),
            by_name=bool((metadata or {}).get("singleton_local_shards", False)),
        )
        return {
            f"{prefix}{name}.weight": shards.factory(prefix, name, linear.weight, (0, 0, self.dp_group.rank()))
            for name, linear in linears.items()
        }


class DeepGemmExperts(Experts):
    """On DeepGEMM (bf16, SM90 and SM100); rows that are not padded to 128 an expert are moved once there and back."""

    backend = "deepgemm"


class GroupedExperts(Experts):
    """On torch's grouped GEMM (bf16, SM90 and SM100; fp32, too, on the CPU)."""

    backend = "grouped"


class SequentialExperts(Experts):
    """On plain torch, one expert after the other, anywhere."""

    backend = "sequential"


EXPERTS: dict[str, type[Experts]] = {
    kind.backend: kind for kind in (DeepGemmExperts, GroupedExperts, SequentialExperts)
}


def use_experts(layer_spec: Any, backend: str) -> None:
    """Put these experts into the MoE part of a transformer layer's ModuleSpec."""
    mlp = layer_spec.submodules.mlp  # a ModuleSpec; from megatron-core 0.18 on a functools.partial
    submodules = mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]
    gemm(backend)
    submodules.experts = EXPERTS[backend]


class _StackedLinear(torch.nn.Module):
    """weight [L, out, in], no bias.

    Megatron's marks: `allreduce=False`, because its gradient is not that of all ranks' data; `tensor_model_parallel`,
    because each rank of the tensor-parallel group has experts of its own, which all count in the gradient's norm
    (megatron-core 0.16 leaves out what it takes for copies, on all ranks but the first; 0.19 does not).
    """

    def __init__(self, config: Any, num_local_experts: int, out_features: int, in_features: int):
        super().__init__()
        device = (
            torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
        )
        shape = (num_local_experts, out_features, in_features)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        self.weight.allreduce = False  # type: ignore[attr-defined]
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def initialize(self, method: Callable[[torch.Tensor], Any], first: int, number: int) -> None:
        """Each expert by itself. On the CPU, where all ranks draw the same numbers, those of the others are skipped."""
        on_cpu = self.weight.device.type == "cpu"
        for expert in range(number) if on_cpu else range(first, first + len(self.weight)):
            here = 0 <= expert - first < len(self.weight)
            method(self.weight[expert - first] if here else torch.empty_like(self.weight[0]))


def _random(config: Any) -> contextlib.AbstractContextManager[Any]:
    """Megatron's random state of experts, which differs between expert-parallel ranks; the CPU's has no such thing."""
    if config.use_cpu_initialization:
        return contextlib.nullcontext()
    return get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())  # type: ignore[no-any-return]


# Field of TransformerConfig -> the value that these experts have. A field that a version lacks is not set.
_NEEDED: dict[str, Any] = {
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
    "fp8": None,
    "fp4": None,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "delay_wgrad_compute": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
    "expert_tensor_parallel_size": 1,
    "recompute of moe_act": False,
    "fine_grained_activation_offloading": False,
}


def _check(config: Any, pg_collection: Any) -> None:
    found = {name: getattr(config, name, value) for name, value in _NEEDED.items()}  # two are not the config's
    found["expert_tensor_parallel_size"] = pg_collection.expt_tp.size()
    selective = config.recompute_granularity == "selective" and "moe_act" in (config.recompute_modules or ())
    found["recompute of moe_act"] = selective
    found["fine_grained_activation_offloading"] = getattr(config, "fine_grained_activation_offloading", False)
    differing = [name for name, value in found.items() if value != _NEEDED[name]]
    if differing:
        raise SettingsError(
            "these experts are plain SwiGLU ones",
            found=", ".join(f"{name}={found[name]}" for name in differing),
            needed=", ".join(f"{name}={_NEEDED[name]}" for name in differing),
            fix="change the configuration, or leave Megatron's own experts in the layer spec",
        )
