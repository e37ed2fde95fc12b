"""A token's top-k selections from the dense probabilities of Megatron's router, and their gradient.

PyTorch's top-k is made for rows of any length. For many tokens and experts on CUDA, `topk_triton` is faster, with one
small kernel each for forward and backward.
"""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import torch

from megatron_ep_v2.gradients import Context, InputGrads, first_order
from megatron_ep_v2.kernels.select import triton_if_installed

# Tokens x experts from which on the kernels are used. The host needs longer to launch them than PyTorch's top-k, which
# matters where a layer waits for the host. On 4 H100s with top-8, consecutive layers took less time with the kernels at
# 4096 x 256 and at 4096 x 128 with large rows, more at 4096 x 128 with small rows (benchmarks/results/README.md).
ENTRIES = 1 << 20
MAX_TOPK = 16  # a kernel's time grows with the top-k; not measured above 8


def top_k(probs: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the largest entries of each row, in any order; differentiable once. An entry of 0 is not selected.

    Args:
        probs: [T, E] of a floating dtype.
        topk: At most E.

    Returns:
        Values [T, K] in probs' dtype, and their columns [T, K] int64: distinct, but -1 for each value of 0 (0.0 or
        -0.0). NaN counts as the largest.

    The gradient of a value of 0 must be 0, as dispatch's is for a column of -1: the kernels do not read it, but
    PyTorch's top-k passes it to one of the row's entries of 0.
    """
    if _suits_kernels(probs, topk) and _kernels() is not None:
        return _TopK.apply(probs, topk)
    values, columns = torch.topk(probs, topk, dim=-1, sorted=False)
    # Not in place: the gradient needs the columns. Not torch.where, which copies its -1 to the GPU and waits for that.
    return values, columns.masked_fill(values == 0, -1)


def _suits_kernels(probs: torch.Tensor, topk: int) -> bool:
    return (
        probs.is_cuda
        and probs.dtype == torch.float32
        and probs.numel() >= ENTRIES
        and topk <= min(MAX_TOPK, probs.shape[1])
    )


class _TopKContext(Context, Protocol):
    num_experts: int


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _TopKContext, probs: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
        kernels = _kernels()
        assert kernels is not None  # `top_k` has looked
        values, indices = kernels.select(probs.contiguous(), topk)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.num_experts = probs.shape[1]
        return values, indices

    @staticmethod
    @first_order(linear=True)
    def backward(ctx: _TopKContext, grad: torch.Tensor | None, _: None) -> InputGrads:
        (indices,) = ctx.saved_tensors
        kernels = _kernels()
        assert kernels is not None
        return (
            None if grad is None else kernels.spread(grad.contiguous(), indices, ctx.num_experts),  # probs
            None,  # topk
        )


def _kernels() -> ModuleType | None:
    """The Triton module; None without Triton, which PyTorch for CUDA brings along."""
    return triton_if_installed(__name__, "torch.topk finds each token's experts")
