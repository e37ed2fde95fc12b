"""The Triton kernels of `topk`: a few rows per program; K times, each row's largest entry is taken."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_ep_v2.kernels.launch import ceil_div, launch, next_power_of_2

ELEMENTS = 2048  # per program: 16 per thread of four warps


def select(probs: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the largest entries of each row, the largest first; among equals, the lowest column first. An entry of 0
    is not selected.

    Args:
        probs: [T, E] fp32, contiguous.
        topk: At most E.

    Returns:
        Values [T, K] fp32 and columns [T, K] int64, -1 where the value is 0.0 or -0.0.
    """
    tokens, experts = probs.shape
    values = torch.empty(tokens, topk, dtype=probs.dtype, device=probs.device)
    indices = torch.empty(tokens, topk, dtype=torch.int64, device=probs.device)
    if tokens:
        _launch(_select, (probs, values, indices), tokens, experts, topk)
    return values, indices


def spread(grad: torch.Tensor, indices: torch.Tensor, experts: int) -> torch.Tensor:
    """torch.zeros(T, E).scatter(1, indices, grad), which ignores columns of -1.

    Args:
        grad: [T, K] fp32, contiguous.
        indices: [T, K] int64, distinct in each row except for -1.
        experts: E.
    """
    tokens, topk = indices.shape
    out = torch.empty(tokens, experts, dtype=grad.dtype, device=grad.device)
    if tokens:
        _launch(_spread, (grad, indices, out), tokens, experts, topk)
    return out


def _launch(
    kernel: triton.JITFunction, tensors: tuple[torch.Tensor, ...], tokens: int, experts: int, topk: int
) -> None:
    """Launch with ELEMENTS elements per program, at least one row."""
    width = next_power_of_2(experts)
    rows = max(1, ELEMENTS // width)
    launch(kernel, (ceil_div(tokens, rows), 1, 1), tensors, (tokens,), (experts, width, topk, rows))


@triton.jit(do_not_specialize=["tokens"])
def _select(  # type: ignore[no-untyped-def]
    probs,
    values,
    indices,
    tokens,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = row < tokens
    start = row.to(tl.int64) * EXPERTS
    inside = here[:, None] & (column < EXPERTS)[None, :]
    bits = tl.load(probs + start[:, None] + column[None, :], mask=inside, other=0).to(tl.int32, bitcast=True)
    # Integers in the order of the floats: NaN above all of them as in PyTorch, -0.0 below 0.0.
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, order)
    keys = (order.to(tl.int64) << 32) | (WIDTH - 1 - column)[None, :].to(tl.int64)
    lowest = -0x7FFFFFFFFFFFFFFF - 1
    keys = tl.where((column < EXPERTS)[None, :], keys, lowest)
    for k in tl.static_range(TOPK):
        best = tl.max(keys, axis=1)
        expert = WIDTH - 1 - (best & 0xFFFFFFFF)
        value = tl.load(probs + start + expert, mask=here)
        # Compare bits: a comparison of floats may flush subnormals to 0.
        zero = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) == 0
        tl.store(indices + row.to(tl.int64) * TOPK + k, tl.where(zero, -1, expert), mask=here)
        tl.store(values + row.to(tl.int64) * TOPK + k, value, mask=here)
        keys = tl.where(keys == best[:, None], lowest, keys)


@triton.jit(do_not_specialize=["tokens"])
def _spread(  # type: ignore[no-untyped-def]
    grad,
    indices,
    out,
    tokens,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = row < tokens
    dense = tl.zeros([ROWS, WIDTH], grad.dtype.element_ty)
    for k in tl.static_range(TOPK):
        entry = row.to(tl.int64) * TOPK + k
        expert = tl.load(indices + entry, mask=here, other=-1).to(tl.int32)
        dense = tl.where(column[None, :] == expert[:, None], tl.load(grad + entry, mask=here, other=0)[:, None], dense)
    inside = here[:, None] & (column < EXPERTS)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * EXPERTS + column[None, :], dense, mask=inside)
