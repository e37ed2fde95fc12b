"""A row in the making, and the rule that what fails on one rank is unavailable on all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch.distributed as dist

from megatron_ep_v2.bench.rows import Row
from megatron_ep_v2.bench.variants import REDUNDANT_EXPERTS, SYNC_FREE_EXPERTS, Variant
from megatron_ep_v2.errors import CaptureError

# What a library that is missing, too old or misused here was seen to raise.
_FAILURES = (ImportError, RuntimeError, ValueError, AssertionError, TypeError, AttributeError, OSError)


class Built(Protocol):
    """What is known of a variant that was built."""

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
        layer: What is run; None while it is not built, and for good where it cannot be.
        status: "ok", "unavailable" or "wrong".
        reason: Why it is not ok.
        errors: Relative L2, by what was compared.
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

    def described(self) -> Row:
        """What a row says about it."""
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
) -> list[Entry[B]]:
    """One for each variant and kind of experts that it can run with, and each SM count where the variant takes one."""
    return [
        Entry(variant, count, kind)
        for variant in variants
        for count in (sms if variant.takes_sms else (None,))
        for kind in experts
        if not variant.sync_free or kind in SYNC_FREE_EXPERTS
        if not variant.redundant_experts or kind in REDUNDANT_EXPERTS
    ]


@contextlib.contextmanager
def noted(*entries: Entry[B]) -> Iterator[None]:
    """What fails inside is noted as the reason why these are unavailable, on every rank if on one; collective."""
    mine = None
    try:
        yield
    except CaptureError:
        raise  # nothing more can be measured in this process
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


def without_repetitions(entries: Sequence[Entry[B]]) -> list[Entry[B]]:
    """Without the repetitions of a variant that is unavailable at every SM count for one reason."""
    seen: set[tuple[str, str | None, str]] = set()
    kept = []
    for entry in entries:
        about = (entry.variant.name, entry.experts, entry.reason)
        if entry.status != "unavailable" or about not in seen:
            kept.append(entry)
        seen.add(about)
    return kept
