"""The Triton kernels of `places`, equal to its reference number by number.

Four kernels in a row, all with a grid that the shapes alone decide: count the picks of each block of 128 by expert; add
up over the blocks; lay the experts out and mark the padding; give each pick its place. No atomics, so the order of rows
is that of the picks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 128  # picks of a program of the first and the last kernel
CHUNK = 256  # blocks that the second one adds up at a time
ROWS = 128  # places of a program of the third

Found = tuple[torch.Tensor, ...]


def place(
    picks: torch.Tensor, num_recv: torch.Tensor | None, num_local_experts: int, num_rows: int, alignment: int
) -> Found:
    """See `places.place`."""
    return _place(picks, num_recv, num_local_experts, num_rows, alignment, masked=False)


def place_masked(picks: torch.Tensor, num_recv: torch.Tensor | None, num_local_experts: int, expected_m: int) -> Found:
    """See `places.place_masked`."""
    return _place(picks, num_recv, num_local_experts, num_local_experts * expected_m, expected_m, masked=True)


def _place(
    picks: torch.Tensor,
    num_recv: torch.Tensor | None,
    num_local_experts: int,
    num_rows: int,
    step: int,
    masked: bool,
) -> Found:
    """step: the alignment, or with `masked` each expert's number of rows."""
    num_picks, topk = picks.numel(), picks.shape[1]
    blocks = max(1, triton.cdiv(num_picks, BLOCK))
    before = torch.empty(num_local_experts, blocks, dtype=torch.int32, device=picks.device)
    totals, counts, ends = _aligned(3, num_local_experts, picks.device)
    rows, sources, m_indices = _aligned(3, num_rows, picks.device)
    slots = torch.empty_like(picks, dtype=torch.int32)
    overflow, needed = _aligned(2, 1, picks.device)
    has_num_recv = num_recv is not None
    received = num_recv if has_num_recv else picks  # some pointer; not read
    width = max(16, triton.next_power_of_2(num_local_experts))

    _count[(blocks,)](
        *(picks, received, before, num_picks, topk, num_local_experts, blocks),
        HAS_NUM_RECV=has_num_recv,
        EXPERTS=width,
        BLOCK=BLOCK,
    )
    _add_up[(num_local_experts,)](before, totals, blocks, CHUNK=CHUNK)
    _lay_out[(max(1, triton.cdiv(num_rows, ROWS)),)](
        *(totals, rows, sources, m_indices, counts, ends, overflow, needed),
        *(num_local_experts, num_rows, step),
        MASKED=masked,
        EXPERTS=width,
        ROWS=ROWS,
    )
    _assign[(blocks,)](
        *(picks, received, before, counts, ends, slots, rows, sources),
        *(num_picks, topk, num_local_experts, blocks),
        HAS_NUM_RECV=has_num_recv,
        BLOCK=BLOCK,
    )
    return slots, rows, sources, m_indices, counts, ends, overflow[0], needed[0]


def _aligned(number: int, size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """int32 vectors in one allocation, each at a multiple of 16 bytes: Triton compiles anew for other alignments."""
    return torch.empty(number, -(-size // 4) * 4, dtype=torch.int32, device=device)[:, :size].unbind()


@triton.jit
def _experts(picks, num_recv, index, num_picks, topk, experts, HAS_NUM_RECV: tl.constexpr):  # type: ignore[no-untyped-def]
    """The local expert of each of these picks; -1 where there is none. Rows that have not come are not read."""
    here = index < num_picks
    if HAS_NUM_RECV:
        here = here & (index // topk < tl.load(num_recv))
    expert = tl.load(picks + index, mask=here, other=-1)
    return tl.where((expert >= 0) & (expert < experts), expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_picks", "topk", "experts", "blocks"])
def _count(  # type: ignore[no-untyped-def]
    picks,
    num_recv,
    before,
    num_picks,
    topk,
    experts,
    blocks,
    HAS_NUM_RECV: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    expert = _experts(picks, num_recv, index, num_picks, topk, experts, HAS_NUM_RECV)
    lane = tl.arange(0, EXPERTS)
    counts = tl.sum((expert[:, None] == lane[None, :]).to(tl.int32), axis=0)
    tl.store(before + lane * blocks + block, counts, mask=lane < experts)


@triton.jit(do_not_specialize=["blocks"])
def _add_up(before, totals, blocks, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program an expert: its picks in each block become its picks in all earlier blocks."""
    expert = tl.program_id(0)
    total = 0
    for first in range(0, blocks, CHUNK):
        index = first + tl.arange(0, CHUNK)
        here = index < blocks
        counts = tl.load(before + expert * blocks + index, mask=here, other=0)
        tl.store(before + expert * blocks + index, total + tl.cumsum(counts, axis=0) - counts, mask=here)
        total += tl.sum(counts, axis=0)
    tl.store(totals + expert, total)


@triton.jit(do_not_specialize=["experts", "num_rows", "step"])
def _lay_out(  # type: ignore[no-untyped-def]
    totals,
    rows,
    sources,
    m_indices,
    counts,
    ends,
    overflow,
    needed,
    experts,
    num_rows,
    step,
    MASKED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program finds all experts' starts, so that none waits for another."""
    lane = tl.arange(0, EXPERTS)
    total = tl.load(totals + lane, mask=lane < experts, other=0)
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

    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = (place[:, None] >= start[None, :]) & (place[:, None] < (start + count)[None, :])
    expert = tl.sum(tl.where(used, lane[None, :] + 1, 0), axis=1) - 1
    tl.store(m_indices + place, expert, mask=place < num_rows)
    padding = (place < num_rows) & (expert < 0)
    tl.store(rows + place, tl.full([ROWS], -1, tl.int32), mask=padding)
    tl.store(sources + place, tl.full([ROWS], -1, tl.int32), mask=padding)
    if tl.program_id(0) == 0:
        tl.store(counts + lane, count, mask=lane < experts)
        tl.store(ends + lane, end, mask=lane < experts)
        tl.store(overflow, tl.sum(total - count, axis=0))
        tl.store(needed, wanted)


@triton.jit(do_not_specialize=["num_picks", "topk", "experts", "blocks"])
def _assign(  # type: ignore[no-untyped-def]
    picks,
    num_recv,
    before,
    counts,
    ends,
    slots,
    rows,
    sources,
    num_picks,
    topk,
    experts,
    blocks,
    HAS_NUM_RECV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    index = block * BLOCK + lane
    expert = _experts(picks, num_recv, index, num_picks, topk, experts, HAS_NUM_RECV)
    earlier = (expert[:, None] == expert[None, :]) & (lane[:, None] > lane[None, :])
    local = expert >= 0
    number = tl.load(before + expert * blocks + block, mask=local, other=0) + tl.sum(earlier.to(tl.int32), axis=1)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)  # where the expert before it ends
    placed = local & (number < tl.load(counts + expert, mask=local, other=0))
    place = start + number
    tl.store(slots + index, tl.where(placed, place, -1), mask=index < num_picks)
    tl.store(rows + place, index // topk, mask=placed)
    tl.store(sources + place, index, mask=placed)
