"""The Triton kernels of `replay`: each program compares all pairs of selections of a few tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_ep_v2.kernels.launch import ceil_div, launch, next_power_of_2

ELEMENTS = 2048  # pairs per program: 16 per thread of four warps


def follow(
    wanted: torch.Tensor,
    before: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    near: float,
    most_far: int,
    most_changed: int,
    another: torch.Tensor,
    ties: torch.Tensor,
) -> torch.Tensor:
    """As `replay.follow`; fp32, contiguous."""
    out = torch.empty_like(weights)
    if len(idx):
        counts = torch.zeros(2, dtype=torch.int32, device=idx.device)
        _launch(_follow, (wanted, before, idx, weights, out, counts), idx.shape, (near,))
        launch(_judge, (1, 1, 1), (counts, another, ties), (most_far, most_changed))
    return out


def back(wanted: torch.Tensor, idx: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """As `replay.back`; fp32, contiguous."""
    out = torch.empty_like(grad)
    if len(idx):
        _launch(_back, (wanted, idx, grad, out), idx.shape, ())
    return out


def _launch(
    kernel: triton.JITFunction, tensors: tuple[torch.Tensor, ...], shape: torch.Size, more: tuple[float, ...]
) -> None:
    tokens, topk = shape
    width = next_power_of_2(topk)
    rows = max(1, ELEMENTS // (width * width))
    launch(kernel, (ceil_div(tokens, rows), 1, 1), tensors, (tokens,), (topk, width, rows, *more))


@triton.jit
def _compare(wanted, idx, tokens, TOPK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets of the selections, and which of them exist, are equal, are gone and are new."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = (row < tokens)[:, None] & (column < TOPK)[None, :]
    entry = row.to(tl.int64)[:, None] * TOPK + column[None, :]
    first = tl.load(wanted + entry, mask=here, other=-2).to(tl.int32)
    second = tl.load(idx + entry, mask=here, other=-3).to(tl.int32)
    same = (first[:, :, None] == second[:, None, :]).to(tl.int32)
    gone = here & (tl.max(same, axis=2) == 0)
    new = here & (tl.max(same, axis=1) == 0)
    return entry, here, same != 0, gone, new


@triton.jit(do_not_specialize=["tokens"])
def _follow(  # type: ignore[no-untyped-def]
    wanted,
    before,
    idx,
    weights,
    out,
    counts,
    tokens,
    TOPK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    NEAR: tl.constexpr,
):
    entry, here, same, gone, new = _compare(wanted, idx, tokens, TOPK, WIDTH, ROWS)
    old = tl.load(before + entry, mask=here, other=0.0)
    now = tl.load(weights + entry, mask=here, other=0.0)
    moved = tl.sum(tl.where(same, now[:, None, :], 0.0), axis=2)
    number = tl.maximum(tl.sum(new.to(tl.int32), axis=1), 1).to(tl.float32)
    instead = tl.sum(tl.where(new, now, 0.0), axis=1) / number
    tl.store(out + entry, tl.where(gone, instead[:, None], moved), mask=here)
    close = tl.abs(now[:, None, :] - old[:, :, None]) <= NEAR * old[:, :, None]
    near = tl.max((close & new[:, None, :]).to(tl.int32), axis=2) != 0
    tl.atomic_add(counts, tl.sum(tl.sum(gone.to(tl.int32), axis=1), axis=0))
    tl.atomic_add(counts + 1, tl.sum(tl.sum((gone & ~near).to(tl.int32), axis=1), axis=0))


@triton.jit(do_not_specialize=["tokens"])
def _back(  # type: ignore[no-untyped-def]
    wanted, idx, grad, out, tokens, TOPK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    entry, here, same, gone, new = _compare(wanted, idx, tokens, TOPK, WIDTH, ROWS)
    value = tl.load(grad + entry, mask=here, other=0.0)
    moved = tl.sum(tl.where(same, value[:, :, None], 0.0), axis=1)
    number = tl.maximum(tl.sum(new.to(tl.int32), axis=1), 1).to(tl.float32)
    share = tl.sum(tl.where(gone, value, 0.0), axis=1) / number
    tl.store(out + entry, tl.where(new, share[:, None], moved), mask=here)


@triton.jit(do_not_specialize=["most_far", "most_changed"])
def _judge(counts, another, ties, most_far, most_changed):  # type: ignore[no-untyped-def]
    changed, far = tl.load(counts), tl.load(counts + 1)
    is_another = (far > most_far) | (changed > most_changed)
    tl.store(another, tl.load(another) + tl.where(is_another, changed, 0))
    tl.store(ties, tl.load(ties) + tl.where(is_another, 0, changed))
