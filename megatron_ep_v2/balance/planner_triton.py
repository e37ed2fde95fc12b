"""The Triton kernels of `planner`, equal to its definition: one program plans, two kernels map selections.

No atomics, and no grid depends on values: a CUDA graph can capture all of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_ep_v2.kernels.launch import launch

BLOCK = 128  # selections per program


def plan(counts: torch.Tensor, num_slots: int, min_rows: int, from_percent: int) -> dict[str, torch.Tensor]:
    """The fields of `planner.plan`. counts: [P, E] int64, contiguous."""
    ranks, experts = counts.shape
    planned, starts, rows = (counts.new_empty(ranks, num_slots) for _ in range(3))
    home_rows, before = counts.new_empty(experts), torch.empty_like(counts)
    launch(
        _plan,
        (1, 1, 1),
        (counts, planned, starts, rows, home_rows, before),
        (ranks, experts // ranks, num_slots, min_rows, from_percent),
        (_width(ranks), _width(experts // ranks), _width(num_slots)),
    )
    return {"experts": planned, "starts": starts, "rows": rows, "home_rows": home_rows, "before": before}


def map_selections(
    topk_idx: torch.Tensor, planned: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor, before: torch.Tensor
) -> torch.Tensor:
    """See `planner.map_selections`. before: [E], this rank's row; the others are the plan's fields, contiguous."""
    physical, (ranks, num_slots), experts = torch.empty_like(topk_idx), planned.shape, len(before)
    num_selections = topk_idx.numel()
    if not num_selections:
        return physical
    blocks = triton.cdiv(num_selections, BLOCK)
    counts = torch.empty(experts, blocks, dtype=torch.int32, device=topk_idx.device)
    launch(_count, (blocks, 1, 1), (topk_idx, counts), (num_selections, experts, blocks), (_width(experts), BLOCK))
    launch(
        _map,
        (blocks, 1, 1),
        (topk_idx, counts.cumsum(1, dtype=torch.int32), before, planned, starts, rows, physical),
        (num_selections, experts, blocks, experts // ranks, ranks, num_slots),
        (_width(ranks * num_slots), BLOCK),
    )
    return physical


def _width(number: int) -> int:
    return max(2, triton.next_power_of_2(number))


@triton.jit
def _first_largest(values, index, END: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest of some values, and of equals the lowest index."""
    most = tl.max(values, axis=0)
    return most, tl.min(tl.where(values == most, index, END), axis=0)


@triton.jit(do_not_specialize=["ranks", "local", "num_slots", "min_rows", "from_percent"])
def _plan(  # type: ignore[no-untyped-def]
    counts,
    planned_out,
    starts_out,
    rows_out,
    home_rows,
    before,
    ranks,
    local,
    num_slots,
    min_rows,
    from_percent,
    RANKS: tl.constexpr,
    LOCAL: tl.constexpr,
    SLOTS: tl.constexpr,
):
    rank, lane, slot = tl.arange(0, RANKS), tl.arange(0, LOCAL), tl.arange(0, SLOTS)
    here = (rank < ranks)[:, None] & (lane < local)[None, :]
    expert = rank[:, None] * local + lane[None, :]
    quota = tl.zeros([RANKS, LOCAL], tl.int64)  # what each home keeps
    for source in range(0, ranks):
        row = source * ranks * local
        tl.store(before + row + expert, quota, mask=here)
        quota += tl.load(counts + row + expert, mask=here, other=0)
    load = tl.sum(quota, axis=1)
    total = tl.sum(load, axis=0)
    mean = (total + ranks - 1) // ranks
    quota = tl.where(here, quota, -1)
    load = tl.where(rank < ranks, load, -1)
    worth = tl.max(load, axis=0) * ranks * 100 >= total * from_percent

    used = tl.zeros([RANKS], tl.int32)
    planned = tl.full([RANKS, SLOTS], -1, tl.int32)
    starts = tl.zeros([RANKS, SLOTS], tl.int64)
    rows = tl.zeros([RANKS, SLOTS], tl.int64)
    # Once nothing was moved nothing changes, so all later rounds move nothing either.
    for _ in range(0, ranks * num_slots):
        most, busiest = _first_largest(load, rank, RANKS)
        largest, own = _first_largest(tl.max(tl.where((rank == busiest)[:, None], quota, -1), axis=0), lane, LOCAL)
        chosen = busiest * local + own
        free = (rank < ranks) & (rank != busiest) & (used < num_slots)
        room, target = _first_largest(tl.where(free, mean - load, -1), rank, RANKS)
        moved = tl.minimum(tl.minimum(largest, room), most - mean)
        moved = tl.where(worth & (moved >= min_rows), moved, 0)
        to = (rank == target) & (moved > 0)
        into = to[:, None] & (slot[None, :] == used[:, None])
        planned = tl.where(into, chosen, planned)
        starts = tl.where(into, largest - moved, starts)
        rows = tl.where(into, moved, rows)
        quota -= tl.where(here & (expert == chosen), moved, 0)
        load += tl.where(to, moved, 0) - tl.where(rank == busiest, moved, 0)
        used += to.to(tl.int32)

    tl.store(home_rows + expert, quota, mask=here)
    inside = (rank < ranks)[:, None] & (slot < num_slots)[None, :]
    entry = rank[:, None] * num_slots + slot[None, :]
    tl.store(planned_out + entry, planned.to(tl.int64), mask=inside)
    tl.store(starts_out + entry, starts, mask=inside)
    tl.store(rows_out + entry, rows, mask=inside)


@triton.jit
def _experts(topk_idx, index, num_selections, experts):  # type: ignore[no-untyped-def]
    """The logical expert of each selection, -1 if there is none."""
    expert = tl.load(topk_idx + index, mask=index < num_selections, other=-1)
    return tl.where((expert >= 0) & (expert < experts), expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_selections", "experts", "blocks"])
def _count(topk_idx, counts, num_selections, experts, blocks, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Selections of each expert in each block."""
    block, lane = tl.program_id(0), tl.arange(0, EXPERTS)
    expert = _experts(topk_idx, block * BLOCK + tl.arange(0, BLOCK), num_selections, experts)
    number = tl.sum((expert[:, None] == lane[None, :]).to(tl.int32), axis=0)
    tl.store(counts + lane * blocks + block, number, mask=lane < experts)


@triton.jit(do_not_specialize=["num_selections", "experts", "blocks", "local", "ranks", "num_slots"])
def _map(  # type: ignore[no-untyped-def]
    topk_idx,
    until,
    before,
    planned,
    starts,
    rows,
    physical,
    num_selections,
    experts,
    blocks,
    local,
    ranks,
    num_slots,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """until: [E, blocks], selections of each expert up to the end of each block."""
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    expert = _experts(topk_idx, index, num_selections, experts)
    valid = expert >= 0
    later = tl.arange(0, BLOCK)[:, None] > tl.arange(0, BLOCK)[None, :]
    ordinal = tl.sum(((expert[:, None] == expert[None, :]) & later).to(tl.int64), axis=1)
    ordinal += tl.load(before + expert, mask=valid, other=0)
    ordinal += tl.load(until + expert * blocks + block - 1, mask=valid & (index >= BLOCK), other=0)

    segment = tl.arange(0, SEGMENTS)
    inside = segment < ranks * num_slots
    held = tl.load(planned + segment, mask=inside, other=-1)
    start = tl.load(starts + segment, mask=inside, other=0)
    end = start + tl.load(rows + segment, mask=inside, other=0)
    found = (
        (expert[:, None] == held[None, :]) & (ordinal[:, None] >= start[None, :]) & (ordinal[:, None] < end[None, :])
    )
    number = tl.sum(tl.where(found, segment[None, :] + 1, 0), axis=1) - 1
    divisor = tl.maximum(num_slots, 1)
    replica = number // divisor * (local + num_slots) + local + number % divisor
    home = expert // local * (local + num_slots) + expert % local
    tl.store(physical + index, tl.where(valid, tl.where(number >= 0, replica, home), -1), mask=index < num_selections)
