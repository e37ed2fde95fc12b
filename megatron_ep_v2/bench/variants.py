"""What is measured: Megatron's dispatchers as this environment offers them, and the raw buffer calls below them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import megatron_ep_v2
from megatron_ep_v2 import installer
from megatron_ep_v2.errors import UnavailableError

_FUSED = {"moe_permute_fusion": True}

# Whose experts run in a whole training step: Megatron's own, the same on TransformerEngine's op fuser, this package's.
EXPERT_BACKENDS = ("megatron", "megatron-opfuser", "grouped", "deepgemm", "sequential")


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: As on the command line.
        kind: Megatron's `moe_token_dispatcher_type`, or "raw": the buffer's own calls without Megatron.
        backend: Megatron's `moe_flex_dispatcher_backend`.
        buffer: This package's buffer; None = Megatron's own code, untouched.
        layout: With `buffer`.
        config: More fields of TransformerConfig.
        takes_sms: `--sms` makes one row for each SM count.
    """

    name: str
    kind: str
    backend: str = "deepep"
    buffer: str | None = None
    layout: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    takes_sms: bool = True


def _ours(name: str, buffer: str, layout: str, kind: str = "flex", config: Mapping[str, Any] | None = None) -> Variant:
    return Variant(name, kind, buffer=buffer, layout=layout, config=config or {}, takes_sms=buffer != "reference")


VARIANTS = {
    variant.name: variant
    for variant in (
        _ours("raw-compact", "elastic", "compact", "raw"),
        _ours("raw-expanded", "elastic", "expanded", "raw"),
        _ours("raw-reference-compact", "reference", "compact", "raw"),
        _ours("raw-reference-expanded", "reference", "expanded", "raw"),
        Variant("allgather", "allgather", takes_sms=False),
        Variant("alltoall", "alltoall", takes_sms=False),
        Variant("alltoall+fused-permute", "alltoall", config=_FUSED, takes_sms=False),
        Variant("megatron-deepep", "flex"),
        Variant("megatron-deepep+fused-permute", "flex", config=_FUSED),
        Variant("megatron-deepepv2", "flex", "deepepv2"),
        Variant("megatron-deepepv2+fused-permute", "flex", "deepepv2", config=_FUSED),
        Variant("hybridep", "flex", "hybridep"),
        Variant("hybridep+fused-permute", "flex", "hybridep", config=_FUSED),
        Variant("hybridep+permute-inside", "flex", "hybridep", config={"moe_permute_fusion_into_hybridep": True}),
        _ours("reference-compact", "reference", "compact"),
        _ours("reference-expanded", "reference", "expanded"),
        _ours("legacy", "legacy", "compact"),
        _ours("legacy+fused-permute", "legacy", "compact", config=_FUSED),
        _ours("compact", "elastic", "compact"),
        _ours("compact+fused-permute", "elastic", "compact", config=_FUSED),
        _ours("expanded", "elastic", "expanded"),
        Variant("ncclep", "flex", "ncclep"),  # the last: where it does not start, NCCL itself has refused it
    )
}


def make_dispatchers(
    variant: Variant,
    count: int,
    group: Any,
    alone: Any,
    *,
    hidden: int,
    experts: int,
    topk: int,
    dtype: torch.dtype,
    **config: Any,
) -> tuple[list[Any], list[tuple[Any, str, Any, Any]]]:
    """Megatron's token dispatchers outside any model, and what must be bound in Megatron while they run.

    Args:
        count: How many.
        group: Process group of the experts.
        alone: Process group of this rank alone, for tensor parallelism.
        **config: More fields of TransformerConfig.

    Returns:
        The dispatchers; and what `install()` had bound when they were made (module or class, name, Megatron's object,
        ours), for Megatron looks it up at every call. Nothing of it is bound any more.

    Raises:
        EPError, ImportError, ValueError, AssertionError: This environment does not offer it.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {item.name: item for item in dataclasses.fields(TransformerConfig)}
    backends = typing.get_args(known["moe_flex_dispatcher_backend"].type)
    if variant.kind == "flex" and variant.backend not in backends:
        raise UnavailableError(
            f"this megatron-core has no backend {variant.backend}",
            found=", ".join(backends) or "no list of backends",
            fix="measure it with a Megatron-Core that has it",
        )
    config = {**variant.config, **config}
    missing = sorted(set(config) - set(known))
    if missing:
        raise UnavailableError(
            f"this megatron-core has no {missing[0]}", fix="measure it with a Megatron-Core that has it"
        )
    classes: dict[str, Callable[..., Any]] = {
        "allgather": token_dispatcher.MoEAllGatherTokenDispatcher,
        "alltoall": token_dispatcher.MoEAlltoAllTokenDispatcher,
        "flex": token_dispatcher.MoEFlexTokenDispatcher,
    }
    values = {
        "num_layers": 1,
        "hidden_size": hidden,
        "num_attention_heads": 8,
        "num_moe_experts": experts,
        "moe_router_topk": topk,
        "moe_token_dispatcher_type": variant.kind,
        "moe_flex_dispatcher_backend": variant.backend,
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": group.size(),
        "use_cpu_initialization": not torch.cuda.is_available(),
        "add_bias_linear": False,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    }
    num_local = experts // group.size()
    local = list(range(group.rank() * num_local, (group.rank() + 1) * num_local))
    groups = ProcessGroupCollection()
    groups.ep = groups.tp_ep = group
    groups.tp = groups.expt_tp = alone
    if variant.buffer:
        megatron_ep_v2.install(buffer=variant.buffer, layout=variant.layout)
    try:
        made = [
            classes[variant.kind](num_local, local, TransformerConfig(**values | config), groups) for _ in range(count)
        ]
        return made, [binding for binding in installer.bound() if binding[1] != "destroy_process_group"]
    finally:
        if variant.buffer:
            megatron_ep_v2.uninstall()


def sms_field(backend: str) -> str:
    """The field of TransformerConfig that takes an SM count for a backend of Megatron's own."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    names = {item.name for item in dataclasses.fields(TransformerConfig)}
    return "moe_flex_dispatcher_num_sms" if "moe_flex_dispatcher_num_sms" in names else f"moe_{backend}_num_sms"
