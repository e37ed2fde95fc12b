"""The Triton kernels of `swiglu`: one program per row, one pass over memory each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_ep_v2.kernels.launch import ceil_div, launch
from megatron_ep_v2.kernels.move_triton import accumulator_kind, tile

TAIL_ROWS = 8  # rows per program of `zero_tail_`


def forward(h: torch.Tensor, probs: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
    """See `swiglu.forward`."""
    rows, columns = h.shape[0], h.shape[1] // 2
    out = torch.empty(rows, columns, dtype=h.dtype, device=h.device)
    if out.numel():
        block, warps = tile(columns, h.element_size())
        launch(
            _forward,
            (rows, 1, 1),
            (h, probs, used if used is not None else h, out),
            constants=(used is not None, columns, accumulator_kind(h), block),
            num_warps=warps,
        )
    return out


def backward(
    grad: torch.Tensor, h: torch.Tensor, probs: torch.Tensor, used: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `swiglu.backward`."""
    rows, columns = grad.shape
    grad_h, grad_probs = torch.empty_like(h), torch.empty_like(probs)
    if grad_h.numel():
        block, warps = tile(columns, h.element_size())
        launch(
            _backward,
            (rows, 1, 1),
            (grad, h, probs, used if used is not None else h, grad_h, grad_probs),
            constants=(used is not None, columns, accumulator_kind(h), block),
            num_warps=warps,
        )
    return grad_h, grad_probs


def zero_tail_(rows: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
    """See `swiglu.zero_tail_`; rows [P, H]. Programs whose rows are in use end at once."""
    if used is not None and rows.numel():
        number, columns = rows.shape
        block, warps = tile(columns, rows.element_size())
        grid = (ceil_div(number, TAIL_ROWS), 1, 1)
        launch(_zero_tail, grid, (rows, used), (number,), (columns, TAIL_ROWS, block), num_warps=warps)
    return rows


@triton.jit
def _width(row, used, BOUNDED: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Number of columns of this row to read: 0 for unowned rows."""
    width = COLUMNS
    if BOUNDED:
        width = tl.where(row < tl.load(used), COLUMNS, 0)
    return width


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    h,
    probs,
    used,
    out,
    BOUNDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    width = _width(row, used, BOUNDED, COLUMNS)
    prob = tl.load(probs + row, mask=width > 0, other=0).to(KIND)
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        gate = tl.load(h + row * (2 * COLUMNS) + column, mask=column < width, other=0).to(KIND)
        up = tl.load(h + row * (2 * COLUMNS) + COLUMNS + column, mask=column < width, other=0).to(KIND)
        value = gate / (1 + tl.exp(-gate)) * up * prob
        tl.store(out + row * COLUMNS + column, value.to(out.dtype.element_ty), mask=column < COLUMNS)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad,
    h,
    probs,
    used,
    grad_h,
    grad_probs,
    BOUNDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    width = _width(row, used, BOUNDED, COLUMNS)
    prob = tl.load(probs + row, mask=width > 0, other=0).to(KIND)
    dots = tl.zeros([BLOCK], KIND)
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        gate = tl.load(h + row * (2 * COLUMNS) + column, mask=column < width, other=0).to(KIND)
        up = tl.load(h + row * (2 * COLUMNS) + COLUMNS + column, mask=column < width, other=0).to(KIND)
        incoming = tl.load(grad + row * COLUMNS + column, mask=column < width, other=0).to(KIND)
        sigmoid = 1 / (1 + tl.exp(-gate))
        silu = gate * sigmoid
        dots += incoming * silu * up
        incoming = incoming * prob
        grad_gate = incoming * up * sigmoid * (1 + gate * (1 - sigmoid))
        kind = grad_h.dtype.element_ty
        tl.store(grad_h + row * (2 * COLUMNS) + column, grad_gate.to(kind), mask=column < COLUMNS)
        tl.store(grad_h + row * (2 * COLUMNS) + COLUMNS + column, (incoming * silu).to(kind), mask=column < COLUMNS)
    tl.store(grad_probs + row, tl.sum(dots, axis=0).to(grad_probs.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows"])
def _zero_tail(rows, used, num_rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * ROWS
    first_unused = tl.maximum(tl.load(used).to(tl.int64), start)
    for row in range(first_unused, tl.minimum(start + ROWS, num_rows)):
        for first in range(0, COLUMNS, BLOCK):
            column = first + tl.arange(0, BLOCK)
            zero = tl.zeros([BLOCK], rows.dtype.element_ty)
            tl.store(rows + row * COLUMNS + column, zero, mask=column < COLUMNS)
