"""The Triton kernels of `move`: one program per row of the result, 16-byte accesses, 64-bit offsets."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from megatron_ep_v2.kernels.launch import ceil_div, launch, next_power_of_2
from megatron_ep_v2.kernels.move import accumulator

BYTES = 4096  # of a row that a program loads at a time: two accesses of 16 bytes per thread of four warps
TAKEN = 1024  # elements per program of `take`
SLOTS = 64  # rows per program of `gather_columns`

_TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}
_SAME_SIZE_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """See `move.gather`."""
    out = torch.empty(rows.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    if out.numel():
        source, target = _as_words(x), _as_words(out)
        columns = source.shape[1]
        block, warps = tile(columns, source.element_size())
        launch(_gather, (rows.shape[0], 1, 1), (source, target, rows), constants=(columns, block), num_warps=warps)
    return out


def gather_with_weights(
    x: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor, sources: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `move.gather_with_weights`."""
    number = rows.shape[0]
    out = torch.empty(number, x.shape[1], dtype=x.dtype, device=x.device)
    taken = torch.empty(number, dtype=weights.dtype, device=x.device)
    if number:
        source, target = _as_words(x), _as_words(out)
        columns = source.shape[1]
        block, warps = tile(columns, source.element_size())
        launch(
            _gather_with_weights,
            (number, 1, 1),
            (source, target, rows, weights, taken, sources),
            constants=(columns, block),
            num_warps=warps,
        )
    return out, taken


def _as_words(x: torch.Tensor) -> torch.Tensor:
    """A view as integers of 4 bytes, or of an element's size if a row is no multiple of 4 bytes."""
    size = x.element_size()
    return x.view(torch.int32 if x.shape[1] * size % 4 == 0 else _SAME_SIZE_INT[size])


def take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """See `move.take`."""
    out = torch.empty(index.shape, dtype=values.dtype, device=values.device)
    if out.numel():
        grid = (ceil_div(out.numel(), TAKEN), 1, 1)
        launch(_take, grid, (values, index, out), (out.numel(),), (TAKEN,))
    return out


def reduce(y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """See `move.reduce`."""
    (number, topk), columns = slots.shape, y.shape[1]
    out = torch.empty(number, columns, dtype=y.dtype, device=y.device)
    if out.numel():
        block, warps = tile(columns, y.element_size())
        launch(
            _reduce,
            (number, 1, 1),
            (y, slots, weights if weights is not None else slots, out),
            constants=(weights is not None, topk, columns, accumulator_kind(y), block),
            enable_fp_fusion=False,  # a product is rounded before it is added, as in PyTorch
            num_warps=warps,
        )
    return out


def reduce_with_weights(
    y: torch.Tensor, row_weights: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `move.reduce_with_weights`."""
    (number, topk), columns = slots.shape, y.shape[1]
    out = torch.empty(number, columns, dtype=y.dtype, device=y.device)
    taken = torch.empty(number, topk, dtype=row_weights.dtype, device=y.device)
    if number:
        block, warps = tile(columns, y.element_size())
        launch(
            _reduce_with_weights,
            (number, 1, 1),
            (y, slots, out, row_weights, taken),
            constants=(topk, columns, accumulator_kind(y), block),
            num_warps=warps,
        )
    return out, taken


def spread(
    grad: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, sources: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `move.spread`."""
    grad_y, grad_weights = torch.empty_like(y), torch.zeros_like(weights)
    if y.numel():
        block, warps = tile(y.shape[1], y.element_size())
        launch(
            _spread,
            (y.shape[0], 1, 1),
            (grad, y, rows, sources, weights, grad_y, grad_weights),
            constants=(y.shape[1], accumulator_kind(y), block),
            num_warps=warps,
        )
    return grad_y, grad_weights


def gather_columns(scales: torch.Tensor, rows: torch.Tensor, group: int, stride: int, pack: bool) -> torch.Tensor:
    """See `move.gather_columns`."""
    columns = ceil_div(scales.shape[1], 4) if pack else scales.shape[1]
    groups = max(1, rows.shape[0] // max(1, group))
    out = torch.empty(groups, columns, stride, dtype=torch.int32 if pack else scales.dtype, device=scales.device)
    if out.numel():
        launch(
            _gather_columns,
            (groups, ceil_div(stride, SLOTS), 1),
            (scales.view(torch.int32), rows, out.view(torch.int32)),
            (group, stride),
            (scales.shape[1], columns, pack, next_power_of_2(columns), SLOTS),
        )
    return out


def accumulator_kind(y: torch.Tensor) -> tl.dtype:
    """Triton dtype in which y's elements are summed."""
    return _TRITON[accumulator(y)]


@functools.cache
def tile(columns: int, element_size: int) -> tuple[int, int]:
    """(columns per step, warps). The columns are a power of two that divides the row, if a large enough one does."""
    most = min(BYTES // element_size, next_power_of_2(columns))
    divisor = columns & -columns
    block = min(most, divisor) if divisor >= most // 4 else most
    return block, min(4, max(1, block * element_size // 512))


@triton.jit
def _gather(x, out, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + slot).to(tl.int64)
    width = tl.where(row >= 0, COLUMNS, 0)  # padding reads nothing
    for first in tl.static_range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        words = tl.load(x + row * COLUMNS + column, mask=column < width, other=0)
        tl.store(out + slot * COLUMNS + column, words, mask=column < COLUMNS)


@triton.jit
def _gather_with_weights(x, out, rows, weights, taken, sources, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    slot = tl.program_id(0)
    source = tl.load(sources + slot)
    tl.store(taken + slot, tl.load(weights + source, mask=source >= 0, other=0))
    _gather(x, out, rows, COLUMNS, BLOCK)


@triton.jit(do_not_specialize=["number"])
def _take(values, index, out, number, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = lane < number
    source = tl.load(index + lane, mask=here, other=-1)
    tl.store(out + lane, tl.load(values + source, mask=source >= 0, other=0), mask=here)


@triton.jit
def _reduce(  # type: ignore[no-untyped-def]
    y,
    slots,
    weights,
    out,
    WEIGHTED: tl.constexpr,
    TOPK: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], KIND)
        for k in tl.static_range(TOPK):
            slot = tl.load(slots + row * TOPK + k).to(tl.int64)
            width = tl.where(slot >= 0, COLUMNS, 0)
            term = tl.load(y + slot * COLUMNS + column, mask=column < width, other=0).to(KIND)
            if WEIGHTED:
                term = term * tl.load(weights + row * TOPK + k, mask=slot >= 0, other=0).to(KIND)
            total += term
        tl.store(out + row * COLUMNS + column, total.to(out.dtype.element_ty), mask=column < COLUMNS)


@triton.jit
def _reduce_with_weights(  # type: ignore[no-untyped-def]
    y,
    slots,
    out,
    row_weights,
    taken,
    TOPK: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(TOPK):
        slot = tl.load(slots + row * TOPK + k)
        tl.store(taken + row * TOPK + k, tl.load(row_weights + slot, mask=slot >= 0, other=0))
    _reduce(y, slots, slots, out, False, TOPK, COLUMNS, KIND, BLOCK)


@triton.jit
def _spread(  # type: ignore[no-untyped-def]
    grad,
    y,
    rows,
    sources,
    weights,
    grad_y,
    grad_weights,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + slot).to(tl.int64)
    source = tl.load(sources + slot)
    weight = tl.load(weights + source, mask=row >= 0, other=0).to(KIND)
    width = tl.where(row >= 0, COLUMNS, 0)
    dots = tl.zeros([BLOCK], KIND)
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        incoming = tl.load(grad + row * COLUMNS + column, mask=column < width, other=0).to(KIND)
        dots += incoming * tl.load(y + slot * COLUMNS + column, mask=column < width, other=0).to(KIND)
        back = (incoming * weight).to(grad_y.dtype.element_ty)
        tl.store(grad_y + slot * COLUMNS + column, back, mask=column < COLUMNS)
    dot = tl.sum(dots, axis=0)
    tl.store(grad_weights + source, dot.to(grad_weights.dtype.element_ty), mask=row >= 0)


@triton.jit(do_not_specialize=["group", "stride"])
def _gather_columns(  # type: ignore[no-untyped-def]
    scales,
    rows,
    out,
    group,
    stride,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACK: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
):
    matrix = tl.program_id(0)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    column = tl.arange(0, WIDTH)
    row = tl.load(rows + matrix * group + slot, mask=slot < group, other=-1).to(tl.int64)
    if PACK:
        words = tl.zeros([SLOTS, WIDTH], tl.int32)
        for i in tl.static_range(4):
            scale = column * 4 + i
            here = (row >= 0)[:, None] & (scale < SCALES)[None, :]
            bits = tl.load(scales + row[:, None] * SCALES + scale[None, :], mask=here, other=0)
            words |= ((bits >> 23) & 0xFF) << (8 * i)
    else:
        here = (row >= 0)[:, None] & (column < COLUMNS)[None, :]
        words = tl.load(scales + row[:, None] * SCALES + column[None, :], mask=here, other=0)
    inside = (slot < stride)[:, None] & (column < COLUMNS)[None, :]
    target = (matrix.to(tl.int64) * COLUMNS + column[None, :]) * stride + slot[:, None]
    tl.store(out + target, words, mask=inside)
