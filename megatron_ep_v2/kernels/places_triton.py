"""The Triton kernels of `places`, equal to its PyTorch reference.

Three kernels, with grids that depend on shapes only: count the selections of each block of 128 by expert; sum over the
blocks; lay out the experts, mark the padding and assign the slots. No atomics, so rows are in the order of the
selections. A fourth adds up what a dispatch leaves on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_ep_v2.kernels.launch import ceil_div, launch, next_power_of_2

BLOCK = 128  # selections per program of the first and the last kernel, and slots per program of the last
CHUNK = 256  # blocks that the second kernel sums at a time

Found = tuple[torch.Tensor, ...]


def place(
    selections: torch.Tensor, num_recv: torch.Tensor | None, num_local_experts: int, num_rows: int, alignment: int
) -> Found:
    """See `places.place`."""
    return _place(selections, num_recv, num_local_experts, num_rows, alignment, masked=False)


def place_masked(
    selections: torch.Tensor, num_recv: torch.Tensor | None, num_local_experts: int, expected_m: int
) -> Found:
    """See `places.place_masked`."""
    return _place(selections, num_recv, num_local_experts, num_local_experts * expected_m, expected_m, masked=True)


def _place(
    selections: torch.Tensor,
    num_recv: torch.Tensor | None,
    num_local_experts: int,
    num_rows: int,
    step: int,
    masked: bool,
) -> Found:
    """Launch the three kernels. step: The alignment; with `masked`, the number of rows per expert."""
    num_selections, topk = selections.numel(), selections.shape[1]
    blocks = max(1, ceil_div(num_selections, BLOCK))
    # Per expert: its selections in each block, later those in all earlier blocks; at the end of the row their total.
    before = torch.empty(num_local_experts, blocks + 1, dtype=torch.int32, device=selections.device)
    # Vectors of their own: views into one would be as expensive, and Triton compiles again for another alignment.
    sizes = (selections.shape, num_rows, num_rows, num_rows, num_local_experts, num_local_experts, (), ())
    found = tuple([torch.empty(size, dtype=torch.int32, device=selections.device) for size in sizes])
    has_num_recv = num_recv is not None
    received = selections if num_recv is None else num_recv  # a valid pointer that is not read
    width = max(16, next_power_of_2(num_local_experts))

    numbers = (num_selections, topk, num_local_experts, blocks)
    launch(_count, (blocks, 1, 1), (selections, received, before), numbers, (has_num_recv, width, BLOCK))
    launch(_add_up, (num_local_experts, 1, 1), (before,), (blocks,), (CHUNK,))
    launch(
        _lay_out,
        (max(blocks, ceil_div(num_rows, BLOCK)), 1, 1),
        (selections, received, before, *found),
        (*numbers, num_rows, step),
        (has_num_recv, masked, width, BLOCK),
    )
    return found


def tally(
    counts: torch.Tensor,
    needed: torch.Tensor,
    num_rows: int,
    num_padding: int,
    excess: torch.Tensor,
    most: torch.Tensor | None,
    load: torch.Tensor | None,
) -> None:
    """See `places.tally`."""
    num_experts = counts.shape[0]
    launch(
        _tally,
        (1, 1, 1),
        (counts, needed, excess, excess if most is None else most, excess if load is None else load),
        (num_experts, num_rows, num_padding),
        (most is not None, load is not None, max(16, next_power_of_2(num_experts))),
        num_warps=1,
    )


@triton.jit
def _experts(selections, num_recv, index, num_selections, topk, experts, HAS_NUM_RECV: tl.constexpr):  # type: ignore[no-untyped-def]
    """The local expert of each selection, -1 if it is ignored. Rows past num_recv are not read."""
    here = index < num_selections
    if HAS_NUM_RECV:
        here = here & (index // topk < tl.load(num_recv))
    expert = tl.load(selections + index, mask=here, other=-1)
    return tl.where((expert >= 0) & (expert < experts), expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_selections", "topk", "experts", "blocks"])
def _count(  # type: ignore[no-untyped-def]
    selections,
    num_recv,
    before,
    num_selections,
    topk,
    experts,
    blocks,
    HAS_NUM_RECV: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    expert = _experts(selections, num_recv, index, num_selections, topk, experts, HAS_NUM_RECV)
    lane = tl.arange(0, EXPERTS)
    counts = tl.sum((expert[:, None] == lane[None, :]).to(tl.int32), axis=0)
    tl.store(before + lane * (blocks + 1) + block, counts, mask=lane < experts)


@triton.jit(do_not_specialize=["blocks"])
def _add_up(before, blocks, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per expert: replaces the count of each block by the sum of all earlier blocks."""
    own = before + tl.program_id(0) * (blocks + 1)
    total = 0
    for first in range(0, blocks, CHUNK):
        index = first + tl.arange(0, CHUNK)
        here = index < blocks
        counts = tl.load(own + index, mask=here, other=0)
        tl.store(own + index, total + tl.cumsum(counts, axis=0) - counts, mask=here)
        total += tl.sum(counts, axis=0)
    tl.store(own + blocks, total)


@triton.jit(do_not_specialize=["num_selections", "topk", "experts", "blocks", "num_rows", "step"])
def _lay_out(  # type: ignore[no-untyped-def]
    selections,
    num_recv,
    before,
    slots,
    rows,
    sources,
    m_indices,
    counts,
    ends,
    overflow,
    needed,
    num_selections,
    topk,
    experts,
    blocks,
    num_rows,
    step,
    HAS_NUM_RECV: tl.constexpr,
    MASKED: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program computes all experts' starts, so that none waits for another. Then it handles BLOCK slots, of which
    it writes the padding, and BLOCK selections, which write the other slots: each slot is written once."""
    lane = tl.arange(0, EXPERTS)
    total = tl.load(before + lane * (blocks + 1) + blocks, mask=lane < experts, other=0)
    if MASKED:
        start = lane * step
        count = tl.minimum(total, step)
        end = start + step
        wanted = tl.max(total, axis=0)
    else:
        padded = (total + step - 1) // step * step
        unbounded = tl.cumsum(padded, axis=0)
        start = tl.minimum(unbounded - padded, num_rows)
        count = tl.minimum(total, num_rows - start)
        end = tl.minimum(unbounded, num_rows)
        wanted = tl.sum(padded, axis=0)

    block = tl.program_id(0)
    if block == 0:
        tl.store(counts + lane, count, mask=lane < experts)
        tl.store(ends + lane, end, mask=lane < experts)
        tl.store(overflow, tl.sum(total - count, axis=0))
        tl.store(needed, wanted)

    index = block * BLOCK + tl.arange(0, BLOCK)
    if block * BLOCK < num_rows:
        used = (index[:, None] >= start[None, :]) & (index[:, None] < (start + count)[None, :])
        owner = tl.sum(tl.where(used, lane[None, :] + 1, 0), axis=1) - 1
        tl.store(m_indices + index, owner, mask=index < num_rows)
        padding = (index < num_rows) & (owner < 0)
        tl.store(rows + index, tl.full([BLOCK], -1, tl.int32), mask=padding)
        tl.store(sources + index, tl.full([BLOCK], -1, tl.int32), mask=padding)

    if block < blocks:
        expert = _experts(selections, num_recv, index, num_selections, topk, experts, HAS_NUM_RECV)
        local = expert >= 0
        later = tl.arange(0, BLOCK)[:, None] > tl.arange(0, BLOCK)[None, :]
        earlier = (expert[:, None] == expert[None, :]) & later
        number = tl.load(before + expert * (blocks + 1) + block, mask=local, other=0)
        number += tl.sum(earlier.to(tl.int32), axis=1)
        own = tl.maximum(expert, 0)
        placed = local & (number < tl.gather(count, own, axis=0))
        slot = tl.gather(start, own, axis=0) + number
        tl.store(slots + index, tl.where(placed, slot, -1), mask=index < num_selections)
        tl.store(rows + slot, index // topk, mask=placed)
        tl.store(sources + slot, index, mask=placed)


@triton.jit(do_not_specialize=["experts", "num_rows", "num_padding"])
def _tally(  # type: ignore[no-untyped-def]
    counts,
    needed,
    excess,
    most,
    load,
    experts,
    num_rows,
    num_padding,
    HAS_MOST: tl.constexpr,
    HAS_LOAD: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    wanted = tl.load(needed)
    tl.store(excess, tl.maximum(tl.load(excess), wanted - num_rows))
    if HAS_MOST:
        tl.store(most, tl.maximum(tl.load(most), wanted - num_padding))
    if HAS_LOAD:
        lane = tl.arange(0, EXPERTS)
        here = lane < experts
        tl.store(load + lane, tl.load(load + lane, mask=here) + tl.load(counts + lane, mask=here), mask=here)
