"""Megatron-Core's own MoE parts on CPU ranks: process groups, router and token dispatcher, as its models build them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# On every rank: Megatron-Core says at import which optional packages it does not find.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec  # noqa: E402
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec, build_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class CpuRouter(TopKRouter):
    """Megatron's moves its weight to the GPU on first use. Not the package's own: a job looks at a Megatron without
    it."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype))


@dataclass(frozen=True)
class Split:
    """How the ranks are shared out: tensor parallel (of the experts too) x expert parallel."""

    tp: int
    ep: int

    @property
    def size(self) -> int:
        return self.tp * self.ep

    def __str__(self) -> str:
        return f"tp{self.tp}-ep{self.ep}"


@contextlib.contextmanager
def megatron_ranks(split: Split, **settings: Any) -> Iterator[None]:
    """Megatron's process groups and `install(buffer="reference", **settings)`; nothing of either is left behind."""
    import megatron_ep_v2  # not above: a job looks at a Megatron without it

    with torch.compiler.set_stance("force_eager"):  # Megatron compiles small functions
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=split.tp,
            expert_model_parallel_size=split.ep,
            expert_tensor_parallel_size=split.tp,
        )
        try:
            megatron_ep_v2.install(buffer="reference", **settings)
            yield
        finally:
            megatron_ep_v2.uninstall()
            parallel_state.destroy_model_parallel()


@dataclass(frozen=True)
class Shape:
    """Of one MoE layer."""

    dtype: str
    topk: int
    hidden: int = 1024
    experts: int = 8
    capacity_factor: float | None = None
    router_dtype: str | None = "fp32"

    def __str__(self) -> str:
        return f"{self.dtype}-top{self.topk}"


def make_config(shape: Shape, split: Split, **more: Any) -> TransformerConfig:
    """Of the flex dispatcher's deepep backend; `more` adds fields or replaces them."""
    values = {
        "num_layers": 1,
        "hidden_size": shape.hidden,
        "num_attention_heads": 8,
        "add_bias_linear": False,
        "num_moe_experts": shape.experts,
        "moe_router_topk": shape.topk,
        "moe_router_dtype": shape.router_dtype,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_expert_capacity_factor": shape.capacity_factor,
        "moe_token_drop_policy": "probs",
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "deepep",
        "tensor_model_parallel_size": split.tp,
        "expert_model_parallel_size": split.ep,
        "expert_tensor_parallel_size": split.tp,
        "sequence_parallel": split.tp > 1,
        "params_dtype": DTYPES[shape.dtype],
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**values | more)


def make_moe_layer(shape: Shape, split: Split, **more: Any) -> Any:
    """Megatron's whole MoELayer with its sequential experts, the same weights on every rank."""
    config = make_config(
        shape,
        split,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        ffn_hidden_size=64,
        moe_ffn_hidden_size=64,
        gradient_accumulation_fusion=False,
        **more,
    )
    spec = get_moe_module_spec(use_te=False, num_experts=shape.experts, moe_grouped_gemm=False)
    if isinstance(spec, ModuleSpec):  # before megatron-core 0.18
        spec.submodules.router = CpuRouter
        return build_module(spec, config=config, layer_number=1)
    spec.keywords["submodules"].router = CpuRouter
    return spec(config=config, layer_number=1)


class Layer:
    """A real router and a real flex dispatcher. Each expert multiplies its rows by a number of its own.

    The router has no layer number: Megatron would add its load-balancing loss to a log of the whole process.

    Attributes:
        factors: [experts, tp], the same on all ranks: what each shard of each expert multiplies by.
    """

    def __init__(self, shape: Shape, split: Split, number: int = 1, **more: Any):
        self.config = make_config(shape, split, **more)
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


def make_hidden(shape: Shape, *tokens: int, seed: int = 0) -> torch.Tensor:
    """[*tokens, H], different on every rank."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    return torch.randn(*tokens, shape.hidden, generator=generator).to(DTYPES[shape.dtype])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """In L2; what must be zero must be exactly zero."""
    error, size = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    return error / size if size else error
