"""Megatron-Core's own MoE parts as its models build them, on a CPU and on GPUs: process groups and configuration, its
whole MoE layer, and its router and flex dispatcher alone, around experts that a dense layer can do without.

A job looks at a Megatron without this package, so it is imported in functions.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

# On every rank: Megatron-Core says at import which optional packages it does not find.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec, build_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from tests.helpers.shapes import Shape, Split  # noqa: E402

if not torch.cuda.is_available():  # Megatron's checkpoint keeps the state of the GPU's generator
    megatron_random._get_cuda_rng_state = lambda *_, **__: None
    megatron_random._set_cuda_rng_state = lambda *_, **__: None

AUX_LOSS = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
CAPACITY_FACTOR = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"}


# ---------------------------------------------------------------------------------------- process groups, configuration


@contextlib.contextmanager
def process_groups(split: Split | None = None) -> Iterator[None]:
    """Megatron's process groups; None = expert parallel over all ranks. Nothing of them is left at the end, nor of an
    installation."""
    import megatron_ep_v2

    split = split or Split(1, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=split.tp,
        expert_model_parallel_size=split.ep,
        expert_tensor_parallel_size=split.tp,
    )
    if dist.get_backend() == "nccl":
        model_parallel_cuda_manual_seed(1)
    with torch.compiler.set_stance("force_eager"):  # Megatron compiles small functions, again for each layer
        try:
            yield
        finally:
            megatron_ep_v2.uninstall()
            parallel_state.destroy_model_parallel()
            # Megatron keeps the first one, and copies later ones to it: the example's has another shape.
            MoEAuxLossAutoScaler.main_loss_backward_scale = None


@contextlib.contextmanager
def installed(split: Split, **settings: Any) -> Iterator[None]:
    """`install(buffer="reference", **settings)` in Megatron's process groups."""
    import megatron_ep_v2

    with process_groups(split):
        megatron_ep_v2.install(buffer="reference", **settings)
        yield


def use_dispatcher(shape: Shape, dispatcher: str, layout: str = "expanded") -> None:
    """From now on layers are built with this dispatcher; "flex" is on this package's buffer in this layout ("sync-free"
    is one). Destroys the buffer that was in use."""
    import megatron_ep_v2
    from megatron_ep_v2.megatron.qwen3_moe import cpu

    megatron_ep_v2.uninstall()
    if dispatcher == "flex":  # one capacity, so one set of kernels
        mode: dict[str, Any] = {"sync_free": True} if layout == "sync-free" else {"layout": layout}
        megatron_ep_v2.install(buffer=shape.buffer, num_max_tokens_per_rank=shape.tokens, **mode)
    elif not shape.on_gpu:
        cpu.substitute_alltoall_dispatcher()


def transformer_config(shape: Shape, split: Split | None = None, **more: Any) -> TransformerConfig:
    """Of one layer with the flex dispatcher's deepep backend; `more` adds fields or replaces them."""
    split = split or Split(1, dist.get_world_size())
    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": shape.hidden,
        "num_attention_heads": 8,
        "ffn_hidden_size": shape.ffn,
        "moe_ffn_hidden_size": shape.ffn,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "bf16": shape.dtype == torch.bfloat16,
        "params_dtype": shape.dtype,
        "num_moe_experts": shape.experts,
        "moe_router_topk": shape.topk,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": shape.on_gpu,
        "moe_permute_fusion": shape.on_gpu,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": not shape.on_gpu,
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "deepep",
        "tensor_model_parallel_size": split.tp,
        "expert_model_parallel_size": split.ep,
        "expert_tensor_parallel_size": split.tp,
        "sequence_parallel": split.tp > 1,
    }
    return TransformerConfig(**values | more)


def hidden_states(shape: Shape, *tokens: int, seed: int = 0) -> torch.Tensor:
    """[*tokens, H], different on every rank."""
    generator = torch.Generator(shape.device).manual_seed(1000 * seed + dist.get_rank())
    return torch.randn(*tokens, shape.hidden, generator=generator, device=shape.device).to(shape.dtype)


class CpuRouter(TopKRouter):
    """Megatron's moves its weight to the GPU on first use. Not the package's own, for the job that has none."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype))


# ------------------------------------------------------------------------------------------------- the whole MoE layer


def moe_layer_of(config: TransformerConfig, use_te: bool = False, experts: Any = None) -> Any:
    """Megatron's MoELayer by its own spec, with weights as it initialises them.

    Args:
        use_te: Of TransformerEngine's modules; else with a router that runs on a CPU.
        experts: Class for `MoESubmodules.experts`; None = Megatron's own.
    """
    spec = get_moe_module_spec(
        use_te=use_te, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    before_0_18 = isinstance(spec, ModuleSpec)
    submodules = spec.submodules if before_0_18 else spec.keywords["submodules"]
    if not use_te:
        submodules.router = CpuRouter
    if experts is not None:
        submodules.experts = experts
    build = functools.partial(build_module, spec) if before_0_18 else spec
    return build(config=config, layer_number=1)


def set_weights(layer: torch.nn.Module, std: float = 0.02) -> None:
    """The same every time: equal routers on all ranks, experts of its own on each."""
    for name, parameter in sorted(layer.named_parameters()):
        own = dist.get_rank() if ".experts." in f".{name}" else 0
        generator = torch.Generator(parameter.device).manual_seed(1000 * own + sum(name.encode()))
        parameter.data.normal_(0.0, std, generator=generator)


def build_layer(shape: Shape, dispatcher: str, experts: str | None = None, **more: Any) -> Any:
    """A MoELayer with the same weights every time, on the buffer that is there. experts: one of
    `megatron.experts.EXPERTS`; None = Megatron's own."""
    from megatron_ep_v2.megatron.experts import EXPERTS

    config = transformer_config(shape, moe_token_dispatcher_type=dispatcher, **more)
    layer = moe_layer_of(config, use_te=shape.on_gpu, experts=experts and EXPERTS[experts]).to(shape.device)
    set_weights(layer)
    return layer


def make_layer(shape: Shape, dispatcher: str, layout: str = "expanded", experts: str | None = None, **more: Any) -> Any:
    """`use_dispatcher` and `build_layer` in one: on a new buffer."""
    use_dispatcher(shape, dispatcher, layout)
    return build_layer(shape, dispatcher, experts, **more)


def step(layer: Any, hidden: torch.Tensor, micro_batches: int = 1) -> dict[str, torch.Tensor]:
    """Output and gradients; several micro-batches are all in flight before the first backward."""
    layer.zero_grad(set_to_none=True)
    inputs = [(hidden * (1 + i)).detach().requires_grad_() for i in range(micro_batches)]
    outputs = [layer(x)[0] for x in inputs]
    for y in reversed(outputs):
        y.backward(torch.ones_like(y))
    tensors = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    tensors |= {f"gradient of x {i}": x.grad for i, x in enumerate(inputs)}
    return tensors | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------ router and dispatcher alone


class FlexLayer:
    """A real router and a real flex dispatcher. Each expert multiplies its rows by a number of its own.

    The router has no layer number: Megatron would add its load-balancing loss to a log of the whole process.

    Attributes:
        factors: [experts, tp], the same on all ranks: what each shard of each expert multiplies by.
    """

    def __init__(self, shape: Shape, split: Split, number: int = 1, **more: Any):
        self.config = transformer_config(shape, split, **AUX_LOSS | more)
        groups = get_default_pg_collection()
        generator = torch.Generator().manual_seed(number)
        torch.manual_seed(number)  # the same router on every rank
        self.router = CpuRouter(config=self.config, pg_collection=groups)
        self.factors = 0.5 + torch.rand(shape.experts, split.tp, generator=generator)
        num_local = shape.experts // split.ep
        first = groups.ep.rank() * num_local
        self.local_experts = list(range(first, first + num_local))
        self.local_factors = self.factors[self.local_experts, groups.expt_tp.rank()]
        self.dispatcher = MoEFlexTokenDispatcher(num_local, self.local_experts, self.config, groups)
        self.manager = self.dispatcher._comm_manager

    def dispatch(
        self, hidden: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., H] -> rows [P, H] sorted by local expert, rows of each, their probabilities [P]."""
        hidden, probs = self.dispatcher.dispatch_preprocess(hidden, routing_map, probs)
        hidden, probs = self.dispatcher.token_dispatch(hidden, probs)
        return self.dispatcher.dispatch_postprocess(hidden, probs)

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """[P, H] -> [..., H]."""
        rows = self.dispatcher.combine_preprocess(rows)
        rows = self.dispatcher.token_combine(rows)
        return self.dispatcher.combine_postprocess(rows)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        rows, counts, row_probs = self.dispatch(hidden, *self.router(hidden))
        factors = self.local_factors.repeat_interleave(counts)
        weights = row_probs * torch.nn.functional.pad(factors, (0, len(rows) - len(factors)))
        return self.combine((rows * weights[:, None]).to(rows.dtype))

    def dense(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the layer must give, from this rank's tokens alone, in fp32 or better."""
        probs, _ = self.router(hidden)  # zero where an expert was not chosen, or dropped the token
        weights = probs @ self.factors.sum(dim=1).to(probs.dtype)
        return hidden * weights.view(*hidden.shape[:-1], 1).to(torch.promote_types(hidden.dtype, torch.float32))
