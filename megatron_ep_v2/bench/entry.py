"""Entries of the table, and the rule that an entry which fails on one rank is unavailable on all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch.distributed as dist

from megatron_ep_v2.bench.variants import Variant

# Errors that a missing, too old or misused library raises.
_FAILURES = (ImportError, RuntimeError, ValueError, AssertionError, TypeError, AttributeError, OSError)


class Built(Protocol):
    """Facts about a variant that was built."""

    @property
    def num_sms(self) -> int | None: ...
    @property
    def buffer_bytes(self) -> int | None: ...


B = TypeVar("B", bound=Built)


@dataclass
class Entry(Generic[B]):
    """A variant at one SM count.

    Attributes:
        experts: One of `EXPERT_BACKENDS` in whole training steps, else None.
        layer: The layer to run; None if it is not built (yet).
        status: "ok", "unavailable" or "wrong".
        reason: Why it is not ok.
        errors: Relative L2 errors by name of the tensor.
    """

    variant: Variant
    sms: int | None
    experts: str | None = None
    layer: B | None = None
    status: str = "ok"
    reason: str = ""
    errors: dict[str, float] | None = None

    @property
    def label(self) -> str:
        sms, experts = (f", {self.sms} SMs" if self.sms else ""), (f", {self.experts} experts" if self.experts else "")
        return self.variant.name + sms + experts

    def described(self) -> dict[str, Any]:
        """Fields of the entry's JSON row."""
        buffer_bytes = self.layer.buffer_bytes if self.layer else None
        return {
            "variant": self.variant.name,
            **({"expert_backend": self.experts} if self.experts else {}),
            "buffer": self.variant.buffer,
            "layout": self.variant.layout,
            "num_sms": self.layer.num_sms if self.layer else self.sms,
            "status": self.status,
            "reason": self.reason,
            "relative_l2": self.errors and {name: float(f"{error:.2g}") for name, error in self.errors.items()},
            "buffer_mib": None if buffer_bytes is None else round(buffer_bytes / 2**20, 1),
        }


def entries_of(
    variants: Sequence[Variant], sms: Sequence[int | None], experts: Sequence[str | None] = (None,)
) -> list[Entry[Any]]:
    """Entries for all combinations of variant and experts, and of SM count if the variant takes one."""
    return [
        Entry(variant, count, kind)
        for variant in variants
        for count in (sms if variant.takes_sms else (None,))
        for kind in experts
    ]


@contextlib.contextmanager
def noted(*entries: Entry[Any]) -> Iterator[None]:
    """Mark entries as unavailable, on every rank, if the block fails on any rank; collective."""
    mine = None
    try:
        yield
    except _FAILURES as error:
        mine = f"{type(error).__name__}: {error}"
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, mine)
    failed = {rank: text for rank, text in enumerate(reasons) if text}
    if failed:
        rank, text = min(failed.items())
        for entry in entries:
            entry.status, entry.layer = "unavailable", None
            entry.reason = text if len(set(reasons)) == 1 else f"rank {rank}: {text}"


def distinct(entries: Sequence[Entry[B]]) -> list[Entry[B]]:
    """Drop repeated entries of a variant that is unavailable at every SM count for the same reason."""
    seen: set[tuple[str, str | None, str]] = set()
    kept = []
    for entry in entries:
        about = (entry.variant.name, entry.experts, entry.reason)
        if entry.status != "unavailable" or about not in seen:
            kept.append(entry)
        seen.add(about)
    return kept
