"""What is measured: Megatron's dispatchers as this environment offers them, and the raw buffer calls below them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch.distributed import ProcessGroup

import megatron_ep_v2
from megatron_ep_v2.buffers.carriers import CARRIERS

if TYPE_CHECKING:  # importing it imports Megatron
    from megatron_ep_v2.megatron.standalone import Dispatcher
    from megatron_ep_v2.megatron.symbols import Bound

_FUSED = {"moe_permute_fusion": True}

# Whose experts run in a whole training step: Megatron's own, the same on TransformerEngine's op fuser, this package's.
EXPERT_BACKENDS = ("megatron", "megatron-opfuser", "grouped", "deepgemm", "sequential")
SYNC_FREE_EXPERTS = ("grouped", "deepgemm")  # that take their counts on the device and do not wait for them
REDUNDANT_EXPERTS = ("grouped", "sequential")  # that run rows of replica slots


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
        graph: Forward and backward of a whole training step are replayed from one CUDA graph.
        redundant_experts: Replica slots of each rank; only in whole training steps, with the experts of
            `REDUNDANT_EXPERTS`.
        balance_min_rows: The setting of that name; None = its default.
        overlap: With shared experts next to dispatch and combine (`moe_shared_expert_overlap`); only in whole training
            steps.
        waits: With `overlap`: no call is started, as on a buffer that cannot.
    """

    name: str
    kind: str
    backend: str = "deepep"
    buffer: str | None = None
    layout: str | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    takes_sms: bool = True
    graph: bool = False
    redundant_experts: int = 0
    balance_min_rows: int | None = None
    overlap: bool = False
    waits: bool = False

    @property
    def sync_free(self) -> bool:
        """Whether it needs `SYNC_FREE_EXPERTS`, and so runs in whole training steps alone."""
        return self.layout == "sync-free"

    @property
    def can_be_redundant(self) -> bool:
        """Whether it takes replica slots."""
        expanded = self.layout == "expanded" and self.kind == "flex"
        return expanded and self.buffer is not None and CARRIERS[self.buffer].moves_experts

    def with_replica_slots(self, number: int, min_rows: int | None) -> Variant:
        """The same with so many on each rank; 0 = itself."""
        if not number:
            return self
        name = f"{self.name}+redundant-{number}"
        return replace(self, name=name, redundant_experts=number, balance_min_rows=min_rows)

    def with_overlap(self, recompute: bool) -> list[Variant]:
        """The same without and with shared experts next to communication; itself alone where they cannot be. Where
        calls are started, between the two with calls that wait.

        Args:
            recompute: The layers are recomputed, in which no call is started.
        """
        if self.kind not in ("alltoall", "flex") or self.graph:
            return [self]
        can_start = self.layout == "expanded" and self.buffer is not None and CARRIERS[self.buffer].starts_calls
        config = {**self.config, "moe_shared_expert_overlap": True}
        overlapped = replace(self, name=f"{self.name}+overlap", config=config, overlap=True)
        if recompute or not can_start:
            return [self, overlapped]
        return [self, replace(overlapped, name=f"{self.name}+waiting-overlap", waits=True), overlapped]

    @property
    def installed_with(self) -> dict[str, str | bool | int]:
        """The settings of `install()` for it."""
        assert self.buffer and self.layout
        more: dict[str, str | bool | int] = {"sync_free": True} if self.sync_free else {"layout": self.layout}
        if self.redundant_experts:  # whatever the experts: only that they run replicas is asked of this setting here
            more |= {"redundant_experts": self.redundant_experts, "experts": "sequential"}
        if self.balance_min_rows is not None:
            more["balance_min_rows"] = self.balance_min_rows
        return {"buffer": self.buffer, **more}


def _ours(kind: str = "flex") -> Iterator[Variant]:
    """Those on this package's carriers: one for each layout in which rows are given to Megatron's experts."""
    for carrier in reversed(CARRIERS.values()):
        layouts = [layout for layout in ("compact", "expanded") if layout in carrier.layouts]
        for layout in layouts:
            name = carrier.row_prefix + layout if len(layouts) > 1 else carrier.name
            row = Variant(name, kind, buffer=carrier.name, layout=layout, takes_sms=carrier.needs_cuda)
            if kind == "flex":
                yield row
                if layout == "compact" and carrier.needs_cuda:
                    yield replace(row, name=f"{name}+fused-permute", config=_FUSED)
            elif len(layouts) > 1:  # the contract's own calls need no adapter
                yield replace(row, name=f"raw-{name}")
        if kind == "flex" and "sync-free" in carrier.layouts:
            row = replace(row, name=f"{carrier.row_prefix}sync-free", layout="sync-free")
            yield row
            if carrier.needs_cuda:
                yield replace(row, name=f"{row.name}+graph", graph=True)


VARIANTS = {
    variant.name: variant
    for variant in (
        *_ours("raw"),
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
        *_ours(),
        Variant("ncclep", "flex", "ncclep"),  # the last: where it does not start, NCCL itself has refused it
    )
}


def make_dispatchers(
    variant: Variant,
    count: int,
    group: ProcessGroup,
    alone: ProcessGroup,
    *,
    hidden: int,
    experts: int,
    topk: int,
    dtype: torch.dtype,
    **config: object,
) -> tuple[list[Dispatcher], list[Bound]]:
    """Megatron's token dispatchers outside any model, and what must be bound in Megatron while they run.

    Args:
        count: How many.
        group: Process group of the experts.
        alone: Process group of this rank alone, for tensor parallelism.
        **config: More fields of TransformerConfig.

    Returns:
        The dispatchers; and what `install()` had bound when they were made, for Megatron looks it up at every call.
        Nothing of it is bound any more.

    Raises:
        EPError, ImportError, ValueError, AssertionError: This environment does not offer it.
    """
    from megatron_ep_v2.megatron import binding, standalone

    if variant.buffer:
        megatron_ep_v2.install(**variant.installed_with)
    try:
        made = standalone.make_dispatchers(
            variant.kind,
            variant.backend,
            count,
            group,
            alone,
            hidden=hidden,
            experts=experts,
            topk=topk,
            dtype=dtype,
            **{**variant.config, **config},
        )
        return made, [each for each in binding.bound() if each[1] != "destroy_process_group"]
    finally:
        if variant.buffer:
            megatron_ep_v2.uninstall()
