"""Dispatch and combine of a MoE layer without a wait on the host: no shape depends on a number on the device.

    compact dispatch, W rows     the most that could arrive; ids from R on are ignored (R stays on the device)
    place_contiguous             a slot among M rows, sorted by local expert, for each received selection
    gather_with_weights          [M, H] and [M] for the experts, with their counts on the device
    reduce_rows, combine         back to [T, H]

M is fixed beforehand: `sync_free_rows_percent` of an even share, which is the selections of one full rank, or what
`fit()` has made of it from the rows that arrived. In a step with less even routing, some selections find no slot. They
are left out, counted on the device, and reported before the optimizer's step, on every rank of the group:

    try:
        optimizer.step()
    except LayoutOverflowError:
        sync_free.grow()  # then zero the gradients, run the same batch again, and capture graphs again

Megatron's schedules repeat the step themselves (`megatron.forward_backward`). If a model has several such groups, all
of them repeat it: Megatron's optimizers raise on every rank, other loops call `device_checks.read_all(group of all
ranks)`. docs/sync_free.md has the loop.

An evaluation (a forward without gradients) has no optimizer's step to stop. So it waits on the host, as other layouts
do, and makes room for all rows that arrived. If a CUDA graph captures it, it cannot wait: then a separate check counts
the overflow, and its error names an evaluation.

Everything here can be captured in a CUDA graph, forward and backward. docs/sync_free.md has its costs and limits.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2 import recompute, settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.checks import pass_on
from megatron_ep_v2.buffers.contract import Buffer, Handle
from megatron_ep_v2.device_checks import DeviceCheck
from megatron_ep_v2.errors import EvaluationOverflowError, InputError, LayoutOverflowError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.layouts import Places, gather_with_weights, place_contiguous, reduce_rows, rows_that_fit, tally

logger = logging.getLogger("megatron_ep_v2")


@dataclass(frozen=True)
class SyncFreeHandle:
    """State of a dispatch for its combine: the buffer's handle, and the slot of each selection among the M rows."""

    handle: Handle
    places: Places


def sync_free_dispatch(
    x: torch.Tensor,
    token_indices: torch.Tensor,
    token_probs: torch.Tensor,
    num_experts: int,
    group: ProcessGroup,
    *,
    expert_alignment: int = 1,
    keep_indices: bool = False,
    load_on: Callable[[torch.device], torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SyncFreeHandle]:
    """Send tokens to the ranks of their experts. Arguments as for `fused_dispatch`.

    Args:
        load_on: Called once the dispatch was accepted; returns the [L] int64 on this device to which each expert's rows
            are added, without padding, or None.

    Returns:
        `(rows, row_probs, tokens_per_expert, handle)`: [M, H] sorted by local expert; [M] fp32; both zero on padding;
        [L] int32 ON THE DEVICE, padded counts. Rows after the last expert's are unowned: a grouped GEMM may leave them
        unwritten, and `sync_free_combine` never reads them.

    Raises:
        EPError: See `fused_dispatch`. For selections without a slot LayoutOverflowError, before the optimizer's step.
    """
    recv_x, recv_idx, recv_probs, _, handle = fused_dispatch(
        x, token_indices, token_probs, num_experts, group, do_cpu_sync=False, keep_indices=keep_indices
    )
    assert recv_idx is not None  # compact
    buffer = pool.find(group)
    assert buffer is not None  # the dispatch has built it
    room = _room(buffer, token_indices.shape[1], num_experts, x)
    num_local = num_experts // group.size()
    num_recv = handle.psum_num_recv_tokens_per_scaleup_rank[-1:]
    num_rows = rows_that_fit(room.num_selections, num_local, expert_alignment)
    places = place_contiguous(recv_idx, num_recv, num_local, num_rows, expert_alignment)
    load = load_on(x.device) if load_on else None
    training = torch.is_grad_enabled() or recompute.runs_first()
    if training or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        room.watch(places, training, load)
    else:
        if (needed := int(places.needed)) > num_rows:
            places = place_contiguous(recv_idx, num_recv, num_local, needed, expert_alignment)
        if load is not None:
            load += places.counts
    rows, row_probs = gather_with_weights(recv_x, recv_probs, places)
    counts = places.counts if expert_alignment == 1 else places.padded_counts
    return rows, row_probs, counts, SyncFreeHandle(handle, places)


def sync_free_combine(rows: torch.Tensor, group: ProcessGroup, handle: SyncFreeHandle) -> torch.Tensor:
    """Send rows back to their tokens' ranks and sum them, unweighted.

    Args:
        rows: [M, H], one row for each row from `sync_free_dispatch`.
        group, handle: The dispatch's.

    Returns:
        [T, H].

    Raises:
        EPError: See `fused_combine`.
    """
    try:
        by_token = reduce_rows(rows, handle.places)
    except InputError as refusal:
        buffer: Buffer = vars(handle.handle)["carrier"]  # of the dispatch: the group may have another by now
        buffer.combine(rows, handle.handle, **pass_on(buffer, [refusal]))
        raise
    return fused_combine(by_token, group, handle.handle)[0]


def grow() -> list[int]:
    """After a LayoutOverflowError: make room for what the step needed and an eighth more. Equal on every rank, because
    the error had the same number everywhere. CUDA graphs that were captured before keep their old room.

    Returns:
        The room of each buffer that overflowed, in percent of an even share.
    """
    grown = []
    for room in list(_rooms.values()):
        if room.needed > room.num_selections:
            room.num_selections = min(room.most, room.needed + room.needed // 8)
            grown.append(room.percent(room.num_selections))
            logger.info("sync-free: %s", room)
    return grown


def fit(margin_percent: int = 25) -> list[int]:
    """Make room for the most rows that a rank received in a training step since the last call, and a margin; no more.
    Call it between two steps, on all ranks: after some steps, and before a CUDA graph is captured, which keeps its
    room. It costs nothing, because the counts were read, and agreed by the group, before each optimizer's step.

    Args:
        margin_percent: For the less even routing of later steps. Too little costs a LayoutOverflowError and `grow()`.

    Returns:
        The room of each buffer that has had a training step since, in percent of an even share; it may be larger than
        before. Equal on every rank of the buffer's group.

    Raises:
        InputError: A negative margin.
    """
    if margin_percent < 0:
        raise InputError(
            "fit() would leave less room than steps have needed",
            found=f"margin_percent={margin_percent}",
            needed="0 or more",
            fix="call sync_free.fit() for 25, or with a margin of your own",
        )
    fitted = []
    for room in list(_rooms.values()):
        if room.seen:
            seen, room.seen, room.needed = room.seen, 0, 0
            room.num_selections = min(room.most, -(-seen * (100 + margin_percent) // 100))
            fitted.append(room.percent(room.num_selections))
            logger.info("sync-free: %s; at most %d have arrived on a rank", room, seen)
    return fitted


def rooms() -> tuple[int, ...]:
    """The rows for which each buffer has room now, oldest buffer first; empty before the first dispatch. A CUDA graph
    that was captured with other numbers keeps those: capture it again."""
    return tuple(room.num_selections for room in list(_rooms.values()))


class _Room:
    """Number of selections for which a rank has slots, with its overflow checks. One per buffer, equal on every rank.

    Attributes:
        capacity: The buffer's `num_max_tokens_per_rank`.
        num_selections: Slots, without padding between experts.
        even_share: Selections of one full rank, which is what each rank receives if routing is even.
        most: Upper bound of selections that can arrive.
        needed: Slots that the steps before the last LayoutOverflowError needed; 0 = no overflow so far.
        seen: The most slots that a rank has needed in a training step since the last `fit()`; 0 = none was read.
    """

    def __init__(self, buffer: Buffer, num_topk: int, num_experts: int, x: torch.Tensor):
        device, self._row_bytes = x.device, x.shape[1] * x.element_size()
        ranks, self.capacity = buffer.group.size(), buffer.num_max_tokens_per_rank
        self.even_share = self.capacity * num_topk
        self.most = ranks * self.capacity * min(num_topk, num_experts // ranks)
        percent = settings.active().sync_free_rows_percent
        self.num_selections = min(self.most, -(-self.even_share * percent // 100)) if percent else self.most
        self.needed = self.seen = 0
        own = weakref.ref(self)  # a strong reference would keep the checks alive longer than the buffer
        self.checks = [
            DeviceCheck(functools.partial(_to_error, own, training), device, buffer.group) for training in (False, True)
        ]
        self.most_needed = DeviceCheck(functools.partial(_note, own), device, buffer.group)  # never an error

    def __str__(self) -> str:
        mib = self.num_selections * self._row_bytes / 2**20
        percent = self.percent(self.num_selections)
        return f"room for {self.num_selections} expert rows now, {percent} % of an even share, {mib:.0f} MiB [rows, H]"

    def percent(self, num_selections: int) -> int:
        return -(-100 * num_selections // self.even_share)

    def watch(self, places: Places, training: bool, load: torch.Tensor | None) -> None:
        """Record on the device by how many rows a dispatch exceeded its room, and how many it needed; keeps the largest
        numbers of the step. Adds the experts' rows to `load`."""
        check = self.checks[training]
        most = self.most_needed.count if training else None
        tally(places, places.num_rows - self.num_selections, check.count, most, load)
        check.touch()
        if training:
            self.most_needed.touch()


_rooms: weakref.WeakKeyDictionary[Buffer, _Room] = weakref.WeakKeyDictionary()


def _room(buffer: Buffer, num_topk: int, num_experts: int, x: torch.Tensor) -> _Room:
    room = _rooms.get(buffer)
    if room is None or room.capacity != buffer.num_max_tokens_per_rank:  # which some buffers can raise
        room = _rooms[buffer] = _Room(buffer, num_topk, num_experts, x)
    return room


def _note(own: weakref.ref[_Room], needed: dict[int, int]) -> None:
    """needed: rank -> slots; equal on every rank of the group."""
    room = own()
    assert room is not None  # it owns the check
    room.seen = max(room.seen, *needed.values())


def _to_error(own: weakref.ref[_Room], training: bool, excess: dict[int, int]) -> LayoutOverflowError:
    """Make the error. excess: rank -> rows beyond its room; equal on every rank of the group."""
    room = own()
    assert room is not None  # it owns the check
    worst = max(excess, key=lambda rank: excess[rank])
    room.needed = max(room.needed, room.num_selections + excess[worst])
    percent, now = room.percent(room.needed), room.percent(room.num_selections)
    facts = {
        "found": f"{room.needed} rows for {room.num_selections} slots ({now} % of an even share); "
        f"too many on ranks {sorted(excess)}",
        "needed": f"sync_free_rows_percent={percent} or more for this routing",
    }
    setting = f"or set {settings.variable('sync_free_rows_percent')}={percent} (the same on every rank)"
    if training:
        return LayoutOverflowError(
            f"rank {worst} was sent more rows in this step than its experts have room for; "
            "the step must not be applied",
            **facts,
            fix=f"call megatron_ep_v2.sync_free.grow(), zero the gradients and run the step again, {setting}",
        )
    return EvaluationOverflowError(
        f"rank {worst} was sent more rows in a captured evaluation than its experts have room for; its result is wrong",
        **facts,
        fix=f"call megatron_ep_v2.sync_free.grow(), capture and evaluate again, {setting}; training is not affected",
    )
