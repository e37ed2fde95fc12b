"""The experts as Megatron-Core modules. `install(experts="grouped")` puts them into every MoE layer built afterwards;
`use_experts(spec, "grouped")` puts them into one layer spec.

They have the interface of Megatron's TEGroupedMLP and SequentialMLP. All experts of a rank are one parameter for each
linear, `linear_fc1.weight` [L, 2 * F, H] and `linear_fc2.weight` [L, H, F], because grouped GEMMs read them so;
docs/experts.md describes the consequences for Megatron's DDP, optimizers and checkpoints. Distributed checkpoints save
them expert by expert under Megatron's own keys, so these classes and Megatron's can read each other's checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.experts.counts import Replicas, row_info
from megatron_ep_v2.experts.gemm import gemm
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import run_delayed, run_experts
from megatron_ep_v2.experts.redundant import run_with_replicas
from megatron_ep_v2.megatron.copies import deepcopy_sharing_groups, refuse_to_pickle_groups, shallow_copy
from megatron_ep_v2.megatron.expert_checkpoint import ExpertShards, Offset, check_format
from megatron_ep_v2.megatron.stacked_linear import StackedLinear
from megatron_ep_v2.megatron.symbols import Binding, Owner

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

P = ParamSpec("P")
R = TypeVar("R")


class Experts(MegatronModule):  # type: ignore[misc]
    """SwiGLU experts. Base class; the subclasses name the backend.

    Args:
        num_local_experts: L.
        config: Megatron's TransformerConfig.
        submodules: Unused: the linears are this module's own.
        pg_collection: Megatron's process groups; `ep`, `expt_tp` and `expt_dp` are used.
        name: Passed by Megatron from 0.19 on; unused.

    Raises:
        SettingsError: The configuration asks for something that these experts lack.
        UnavailableError: The backend cannot run here.
    """

    backend: str

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: object = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ):
        super().__init__(config=config)
        assert pg_collection is not None  # Megatron passes it
        _check(config, pg_collection)
        self.num_local_experts = num_local_experts
        self.ep_group, self.dp_group = pg_collection.ep, pg_collection.expt_dp
        self.recompute_activation = _recomputes(config, "moe_act")
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size or config.ffn_hidden_size
        self.linear_fc1 = StackedLinear(config, num_local_experts, 2 * ffn, hidden)
        self.linear_fc2 = StackedLinear(config, num_local_experts, hidden, ffn)
        for module in (self.linear_fc1, self.linear_fc2):
            if not config.use_cpu_initialization:  # else the first forward checks, on the device of the weights then
                gemm(self.backend).check(module.weight.new_empty(0, module.weight.shape[2]), module.weight)
        if config.perform_initialization:
            first, number = self.ep_group.rank() * num_local_experts, self.ep_group.size() * num_local_experts
            with _random(config):
                self.linear_fc1.initialize(config.init_method, first, number)
                self.linear_fc2.initialize(config.output_layer_init_method, first, number)

    __copy__, __deepcopy__, __reduce_ex__ = shallow_copy, deepcopy_sharing_groups, refuse_to_pickle_groups

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Run the experts.

        Args:
            permuted_local_hidden_states: [P, H], sorted by local expert.
            tokens_per_expert: [L] integers, rows of each expert, padding counted. On the CPU they add up to P; on the
                GPU to P at most, and the host does not wait for them (the sequential experts do). They may carry a
                `RowInfo`; with its `replicas` they are [L + R], on the CPU.
            permuted_probs: [P].

        Returns:
            [P, H] weighted by the probabilities, and None: no bias.
        """
        groups = Groups.from_counts(tokens_per_expert, permuted_local_hidden_states)
        replicas = row_info(tokens_per_expert).replicas
        if replicas is not None:
            return self._with_replicas(permuted_local_hidden_states, permuted_probs, groups, replicas), None
        return self.on_groups(permuted_local_hidden_states, permuted_probs, groups), None

    def on_groups(self, rows: torch.Tensor, probs: torch.Tensor, groups: Groups) -> torch.Tensor:
        """`forward` for groups with more information than counts have, e.g. `Groups.from_places`."""
        return run_experts(
            rows, probs, self.linear_fc1, self.linear_fc2, groups, self.backend, self.recompute_activation
        )

    def _with_replicas(
        self, rows: torch.Tensor, probs: torch.Tensor, groups: Groups, replicas: Replicas
    ) -> torch.Tensor:
        for module in (self.linear_fc1, self.linear_fc2):
            module(None)  # DDP's hooks gather the weight, which other ranks get before this one uses it
        return run_with_replicas(
            rows, probs, self.linear_fc1, self.linear_fc2, groups, replicas, self.backend, self.recompute_activation
        )

    def backward_dw(self) -> None:
        """Compute the weights' gradients that backward has left (`delay_wgrad_compute`)."""
        for module in (self.linear_fc2, self.linear_fc1):
            run_delayed(module.delayed)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Offset, ...] = (), metadata: Mapping[str, object] | None = None
    ) -> dict[str, ShardedTensorFactory | ShardedObject]:
        """Sharded state for Megatron's distributed checkpoints; see the module's docstring.

        Raises:
            SettingsError: The optimizer's format could silently mix up experts.
        """
        check_format(metadata or {})
        linears = {"linear_fc1": self.linear_fc1, "linear_fc2": self.linear_fc2}
        shards = ExpertShards(
            first=self.ep_group.rank() * self.num_local_experts,
            local=self.num_local_experts,
            number=self.ep_group.size() * self.num_local_experts,
            offsets=tuple(sharded_offsets),
            by_name=bool((metadata or {}).get("singleton_local_shards", False)),
        )
        replica = (0, 0, self.dp_group.rank())
        state: dict[str, ShardedTensorFactory | ShardedObject] = {}
        for name, module in linears.items():
            state[f"{prefix}{name}.weight"] = shards.factory(prefix, name, module.weight, replica)
            state |= shards.extra_states(prefix, name, replica)
        return state


class DeepGemmExperts(Experts):
    """Experts on DeepGEMM (bf16, SM90 and SM100). Rows not padded to 128 per expert are copied there and back."""

    backend = "deepgemm"


class GroupedExperts(Experts):
    """Experts on torch's grouped GEMM (bf16, SM90 and SM100; on the CPU also fp32)."""

    backend = "grouped"


class SequentialExperts(Experts):
    """Experts on plain torch, one after the other, on any device."""

    backend = "sequential"


EXPERTS: dict[str, type[Experts]] = {
    kind.backend: kind for kind in (DeepGemmExperts, GroupedExperts, SequentialExperts)
}


def use_experts(layer_spec: ModuleSpec, backend: str) -> None:
    """Put these experts into the MoE part of a transformer layer's ModuleSpec."""
    mlp = layer_spec.submodules.mlp  # a ModuleSpec; from megatron-core 0.18 on a functools.partial
    submodules = mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]
    gemm(backend)
    submodules.experts = EXPERTS[backend]


def with_experts(submodules: MoESubmodules, backend: str) -> MoESubmodules:
    """Copy Megatron's MoESubmodules with these experts instead of Megatron's.

    Args:
        submodules: Its `experts` comes from a layer spec: a class, a ModuleSpec (megatron-core 0.16) or a
            functools.partial (from 0.18 on). This package's experts are kept: a spec wins over a setting.

    Raises:
        SettingsError: The experts are neither Megatron's nor this package's.
    """
    kind = submodules.experts
    while not isinstance(kind, type):
        inner = getattr(kind, "module", None) or getattr(kind, "func", None)
        if isinstance(kind, tuple):  # a ModuleSpec may have (module, name)
            inner = import_module(kind)
        if inner is None:
            break
        kind = inner
    if isinstance(kind, type) and issubclass(kind, Experts):
        return submodules
    if not getattr(kind, "__module__", "").startswith("megatron.core."):
        raise SettingsError(
            f"experts={backend} would replace experts that are not Megatron's",
            found=f"MoESubmodules.experts is {kind!r}",
            needed="Megatron's own (TEGroupedMLP, GroupedMLP, SequentialMLP)",
            fix="experts=megatron, which leaves the layer spec as it is",
        )
    return dataclasses.replace(submodules, experts=EXPERTS[backend])


def built_with(init: Callable[..., None], experts: Callable[[], str]) -> Callable[..., None]:
    """Wrap MoELayer.__init__ to build other experts than the layer spec's.

    Args:
        experts: Called for each layer; returns a key of EXPERTS, or "megatron".
    """

    @functools.wraps(init)
    def build(
        self: MoELayer,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        *args: object,
        **kwargs: object,
    ) -> None:
        kind = experts()
        if submodules is not None and kind != "megatron":  # Megatron raises for None
            submodules = with_experts(submodules, kind)
        init(self, config, submodules, *args, **kwargs)

    return build


def _random(config: TransformerConfig) -> contextlib.AbstractContextManager[object]:
    """Megatron's random state for experts, which differs between expert-parallel ranks; on the CPU there is none."""
    if config.use_cpu_initialization:
        return contextlib.nullcontext()
    return get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())


# Field of TransformerConfig -> the value that these experts need. Fields that a version lacks are ignored.
_NEEDED: dict[str, object] = {
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "use_te_activation_func": False,
    "activation_func_fp8_input_store": False,
    "add_bias_linear": False,
    "fp8": None,
    "fp4": None,
    "quant_recipe": None,
    "use_kitchen": False,
    "batch_invariant_mode": False,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_paged_stash": False,
    "moe_ncclep_zero_copy": False,
    "moe_dispatch_fwd_dtype": "bf16",
    "moe_combine_bwd_dtype": "bf16",
    "use_transformer_engine_op_fuser": False,
    "expert_gtp_weight_remat_size": 1,
    "cpu_offloading_weights": False,
    "init_model_with_meta_device": False,
}
_OFFLOADS = {"expert_fc1", "moe_act", "fused_group_mlp"}  # modules of fine-grained offloading inside the experts


def _recomputes(config: TransformerConfig, module: str) -> bool:
    return config.recompute_granularity == "selective" and module in (config.recompute_modules or ())


def _check(config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
    found = {name: getattr(config, name, value) for name, value in _NEEDED.items()}
    needed = dict(_NEEDED)
    if getattr(config, "cpu_offloading_weights", False) and not config.cpu_offloading:
        found["cpu_offloading_weights"] = False  # Megatron reads it only with cpu_offloading
    if getattr(config, "transformer_impl", None) == "inference_optimized":
        found["transformer_impl"], needed["transformer_impl"] = "inference_optimized", "local or transformer_engine"
    found["expert_tensor_parallel_size"], needed["expert_tensor_parallel_size"] = pg_collection.expt_tp.size(), 1
    offloaded = _OFFLOADS & set(getattr(config, "offload_modules", None) or ())
    if getattr(config, "fine_grained_activation_offloading", False) and offloaded:
        found["offload_modules"], needed["offload_modules"] = sorted(offloaded), "none of the experts' own"
    differing = [name for name in found if found[name] != needed[name]]
    if differing:
        raise SettingsError(
            "these experts are plain SwiGLU ones",
            found=", ".join(f"{name}={found[name]}" for name in differing),
            needed=", ".join(f"{name}={needed[name]}" for name in differing),
            fix="change the configuration, or keep Megatron's own experts (experts=megatron)",
        )


# ------------------------------------------------------------------------------- functions that misread stacked experts
#
# Functions of Megatron and of frameworks on it that would silently treat stacked experts as something else. Each is
# wrapped in a guard that raises for a stacked parameter, and changes nothing otherwise.

_KEEP = "experts=megatron (unset MCORE_DEEPEP_V2_EXPERTS)"


@dataclass(frozen=True)
class Refusal:
    """A guarded function, by module and dotted name, and the texts of its error.

    Attributes:
        modules: Modules that have the function; a version of Megatron may have only some of them, or none.
        found, needed, fix: See `EPError`.
    """

    modules: tuple[str, ...]
    name: str
    found: str
    needed: str
    fix: str


_MUON = {
    "found": "a Muon-type optimizer (--optimizer muon), which gives everything that is not 2-D to Adam",
    "needed": "Adam or SGD; or Megatron's own experts, a matrix each",
    "fix": f"--optimizer adam, or {_KEEP}",
}
REFUSALS = (
    Refusal(("megatron.core.optimizer.muon",), "_get_param_groups", **_MUON),  # 0.16, 0.17
    Refusal(("megatron.core.optimizer",), "_get_megatron_emerging_optimizer", **_MUON),  # 0.18 on
    Refusal(
        ("megatron.core.resharding.utils", "megatron.core.resharding.planner"),
        "extract_param_metadata",
        found="a refit (megatron.core.resharding), which takes the experts of all ranks for copies of one parameter",
        needed="one parameter for each expert",
        fix=f"refit with {_KEEP}; checkpoints fit either",
    ),
    Refusal(
        ("megatron.bridge.models.conversion.model_bridge",),
        "MegatronModelBridge.build_conversion_tasks",
        found="a conversion from or to Hugging Face by Megatron-Bridge, which skips parameters that it has no name for",
        needed="one parameter for each expert",
        fix=f"convert with {_KEEP}, and train with either kind from the distributed checkpoint between them",
    ),
)


def bindings() -> Iterator[Binding]:
    """(owner, name, guarded function) for the functions of Megatron and of frameworks that are imported already."""
    for refusal in REFUSALS:
        for module in refusal.modules:
            if module.startswith("megatron.core."):
                with contextlib.suppress(ImportError):
                    importlib.import_module(module)
            *path, name = refusal.name.split(".")
            owner: Owner | None = sys.modules.get(module)
            for part in path:
                owner = getattr(owner, part, None)
            theirs = getattr(owner, name, None)
            if owner is not None and theirs is not None and not hasattr(theirs, "refuses_stacked_experts"):
                yield owner, name, _guarded(theirs, refusal)


def _guarded(theirs: Callable[P, R], refusal: Refusal) -> Callable[P, R]:
    @functools.wraps(theirs)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(_holds_stacked(value) for value in (*args, *kwargs.values())):
            raise SettingsError(
                "stacked experts, one parameter for all experts of a rank, are not supported by this function",
                found=refusal.found,
                needed=refusal.needed,
                fix=refusal.fix,
            )
        return theirs(*args, **kwargs)

    guarded.refuses_stacked_experts = True  # type: ignore[attr-defined]
    return guarded


def _holds_stacked(value: object) -> bool:
    if isinstance(value, torch.nn.Module):
        return any(_holds_stacked(parameter) for parameter in value.parameters())
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(_holds_stacked(item) for item in value)
    return isinstance(value, torch.Tensor) and getattr(value, "stacked_experts", False)
