"""The Triton kernel of `wgrad`: one program per tile of one expert's weight, which reads that expert's rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_ep_v2.kernels.launch import ceil_div, launch

# Tile of the weight, rows per step, warps, stages: the fastest on an H200 of those that `benchmarks/gpu_wgrad.py
# --tiles` tries. Two such programs share a multiprocessor: one reads and writes its tile while the other multiplies.
TILE_N, TILE_K, ROWS, WARPS, STAGES = 128, 128, 64, 4, 3


def add_(out: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, overwrite: bool) -> None:
    """See `wgrad.add_`; grad and x have one dtype, out has it too or fp32."""
    experts, columns_n, columns_k = out.shape
    if not out.numel():
        return
    narrow = grad.element_size() <= 2  # fp32 tiles take twice the shared memory
    tile_n, tile_k, rows, stages = (TILE_N, TILE_K, ROWS, STAGES) if narrow else (64, 64, 32, 2)
    grid = (ceil_div(columns_n, tile_n) * ceil_div(columns_k, tile_k), experts, 1)
    launch(
        _add,
        grid,
        (out, grad, x, ends),
        constants=(columns_n, columns_k, tile_n, tile_k, rows, overwrite),
        num_warps=WARPS,
        num_stages=stages,
    )


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    out,
    grad,
    x,
    ends,
    COLUMNS_N: tl.constexpr,
    COLUMNS_K: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    ROWS: tl.constexpr,
    OVERWRITE: tl.constexpr,
):
    expert = tl.program_id(1)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    if not OVERWRITE and start == end:
        return
    tiles_k = (COLUMNS_K + TILE_K - 1) // TILE_K
    n = (tl.program_id(0) // tiles_k) * TILE_N + tl.arange(0, TILE_N)
    k = (tl.program_id(0) % tiles_k) * TILE_K + tl.arange(0, TILE_K)
    good_n, good_k = n < COLUMNS_N, k < COLUMNS_K
    total = tl.zeros([TILE_N, TILE_K], tl.float32)
    for first in range(start, end, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < end
        a = tl.load(grad + row[None, :] * COLUMNS_N + n[:, None], mask=good_n[:, None] & inside[None, :], other=0.0)
        b = tl.load(x + row[:, None] * COLUMNS_K + k[None, :], mask=inside[:, None] & good_k[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    target = out + expert.to(tl.int64) * COLUMNS_N * COLUMNS_K + n[:, None].to(tl.int64) * COLUMNS_K + k[None, :]
    good = good_n[:, None] & good_k[None, :]
    if not OVERWRITE:
        total += tl.load(target, mask=good, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=good)
