"""A MoE layer's dispatch and combine without a wait on the host: nothing in it depends on a number that the device has.

    compact dispatch, W rows     the most that could arrive; ids from R on are ignored (R stays on the device)
    place_contiguous             a place among M rows, sorted by local expert, for each received pick
    gather_rows, gather_weights  [M, H] and [M]: what the experts get, with their counts on the device
    reduce_rows, combine         back to [T, H]

M is fixed beforehand: `sync_free_rows_percent` of an even share, which is the picks of one full rank. In a step whose
routing is less even, some picks find no place. They are left out, counted on the device, and reported before the
optimizer's step, on every rank of the group alike:

    try:
        optimizer.step()
    except LayoutOverflowError:
        sync_free.grow()  # then zero the gradients and run the same batch again; graphs have to be captured again

Where a model has several such groups, all of them repeat the step: Megatron's optimizers raise on every rank, other
loops ask with `device_checks.read_all(group of all ranks)`. docs/sync_free.md has the loop.

An evaluation (a forward without gradients) has no step that could be refused. So it waits on the host, as other layouts
do, and makes room for what has come. Where a CUDA graph captures it, it cannot: then the overflow is counted by a check
of its own, whose error says that it was an evaluation.

Everything here can be captured in a CUDA graph, forward and backward. docs/sync_free.md says what it costs and needs.
"""

from __future__ import annotations

import functools
import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ep_v2 import recompute, settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.checks import pass_on
from megatron_ep_v2.buffers.contract import Buffer
from megatron_ep_v2.device_checks import DeviceCheck
from megatron_ep_v2.errors import InputError, LayoutOverflowError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.layouts import Places, gather_rows, gather_weights, place_contiguous, reduce_rows, rows_that_fit

logger = logging.getLogger("megatron_ep_v2")


@dataclass(frozen=True)
class SyncFreeHandle:
    """What a dispatch leaves for its combine: the buffer's own handle, and where each pick lies among the M rows."""

    handle: Any
    places: Places


def sync_free_dispatch(
    x: torch.Tensor,
    token_indices: torch.Tensor,
    token_probs: torch.Tensor,
    num_experts: int,
    group: Any,
    *,
    expert_alignment: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SyncFreeHandle]:
    """Send tokens to the ranks of their experts. Arguments as for `fused_dispatch`.

    Returns:
        `(rows, row_probs, tokens_per_expert, handle)`: [M, H] sorted by local expert; [M] fp32; both zero on padding;
        [L] int32 ON THE DEVICE, padded counts. The rows behind the last expert's are padding too: a grouped GEMM may
        leave them unwritten, and `sync_free_combine` never reads them.

    Raises:
        EPError: See `fused_dispatch`. For picks without a place LayoutOverflowError, before the optimizer's step.
    """
    recv_x, recv_idx, recv_probs, _, handle = fused_dispatch(
        x, token_indices, token_probs, num_experts, group, do_cpu_sync=False
    )
    assert recv_idx is not None  # compact
    buffer = pool.find(group)
    assert buffer is not None  # the dispatch has made it
    room = _room(buffer, token_indices.shape[1], num_experts, x.device)
    num_local = num_experts // group.size()
    num_recv = handle.psum_num_recv_tokens_per_scaleup_rank[-1:]
    num_rows = rows_that_fit(room.num_picks, num_local, expert_alignment)
    places = place_contiguous(recv_idx, num_recv, num_local, num_rows, expert_alignment)
    training = torch.is_grad_enabled() or recompute.runs_first()
    if training or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        room.watch(places, training)
    elif (needed := int(places.needed)) > num_rows:
        places = place_contiguous(recv_idx, num_recv, num_local, needed, expert_alignment)
    rows, row_probs = gather_rows(recv_x, places), gather_weights(recv_probs, places)
    counts = places.counts if expert_alignment == 1 else places.padded_counts
    return rows, row_probs, counts, SyncFreeHandle(handle, places)


def sync_free_combine(rows: torch.Tensor, group: Any, handle: SyncFreeHandle) -> torch.Tensor:
    """Send rows back to their tokens' ranks and add them up, unweighted.

    Args:
        rows: [M, H], as `sync_free_dispatch` delivered them.
        group, handle: The dispatch's.

    Returns:
        [T, H].

    Raises:
        EPError: See `fused_combine`.
    """
    try:
        by_token = reduce_rows(rows, handle.places)
    except InputError as refusal:
        buffer = handle.handle.carrier  # of the dispatch, whatever the group has by now
        buffer.combine(rows, handle.handle, **pass_on(buffer, [refusal]))
        raise
    return fused_combine(by_token, group, handle.handle)[0]


def grow() -> list[int]:
    """After a LayoutOverflowError: make room for what the step needed and an eighth more. Every rank does the same,
    since the error told each the same number. CUDA graphs that were captured before keep their old room.

    Returns:
        The room of each buffer that overflowed, in percent of an even share.
    """
    grown = []
    for room in list(_rooms.values()):
        if room.needed > room.num_picks:
            room.num_picks = min(room.most, room.needed + room.needed // 8)
            grown.append(room.percent(room.num_picks))
            logger.info("sync-free: room for %d expert rows now, %d %% of an even share", room.num_picks, grown[-1])
    return grown


class _Room:
    """How many picks find a place on a rank, and whether that was enough. One for each buffer, equal on every rank.

    Attributes:
        capacity: The buffer's `num_max_tokens_per_rank`.
        num_picks: Places, padding between experts not counted.
        even_share: Picks of one full rank, which is what a rank gets where the routing is even.
        most: Picks that could arrive at all.
        needed: What the steps before the last LayoutOverflowError needed; 0 = enough so far.
    """

    def __init__(self, buffer: Buffer, num_topk: int, num_experts: int, device: torch.device):
        ranks, self.capacity = buffer.group.size(), buffer.num_max_tokens_per_rank
        self.even_share = self.capacity * num_topk
        self.most = ranks * self.capacity * min(num_topk, num_experts // ranks)
        percent = settings.active().sync_free_rows_percent
        self.num_picks = min(self.most, -(-self.even_share * percent // 100)) if percent else self.most
        self.needed = 0
        own = weakref.ref(self)  # or the checks, which each step asks, would outlive the buffer
        self.checks = [
            DeviceCheck(functools.partial(_to_error, own, training), device, buffer.group) for training in (False, True)
        ]

    def percent(self, num_picks: int) -> int:
        return -(-100 * num_picks // self.even_share)

    def watch(self, places: Places, training: bool) -> None:
        """Note on the device by how many rows a dispatch exceeded its room; the largest excess of the step counts."""
        check = self.checks[training]
        torch.maximum(check.count, places.needed - places.num_rows, out=check.count)
        check.touch()


_rooms: weakref.WeakKeyDictionary[Buffer, _Room] = weakref.WeakKeyDictionary()


def _room(buffer: Buffer, num_topk: int, num_experts: int, device: torch.device) -> _Room:
    room = _rooms.get(buffer)
    if room is None or room.capacity != buffer.num_max_tokens_per_rank:  # which some buffers can raise
        room = _rooms[buffer] = _Room(buffer, num_topk, num_experts, device)
    return room


def _to_error(own: weakref.ref[_Room], training: bool, excess: dict[int, int]) -> LayoutOverflowError:
    """excess: rank -> rows beyond its room; every rank of the group gets the same."""
    room = own()
    assert room is not None  # it owns the check
    worst = max(excess, key=lambda rank: excess[rank])
    room.needed = max(room.needed, room.num_picks + excess[worst])
    percent = room.percent(room.needed)
    facts = {
        "found": f"{room.needed} rows for {room.num_picks} places ({room.percent(room.num_picks)} % of an even share); "
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
    return LayoutOverflowError(
        f"rank {worst} was sent more rows in a captured evaluation than its experts have room for; its result is wrong",
        **facts,
        fix=f"call megatron_ep_v2.sync_free.grow(), capture and evaluate again, {setting}; training is not concerned",
    )
