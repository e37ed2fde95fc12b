"""A token's experts out of the dense probabilities that Megatron's router gives, and their gradient back into them.

PyTorch's top-k is made for rows of any length. Of many tokens and experts, on CUDA tensors, `topk_triton` is faster,
each way in one small kernel.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Of the probabilities, from which on the kernels are worth what the host takes to launch them. On 4 H100s layers in a
# row took longer with them at 4096 x 128 where they waited for the host, and less time at 4096 x 256
# (benchmarks/results/h100x4/bench_topk_before.jsonl, bench_topk_after.jsonl).
ENTRIES = 1 << 20


def top_k(probs: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest entries of each row, in any order, differentiable.

    Args:
        probs: [T, E] fp32.
        topk: At most E.

    Returns:
        Values [T, K] fp32, and their columns [T, K] int64, all different. NaN counts as the largest.
    """
    if probs.is_cuda and probs.numel() >= ENTRIES and _kernels() is not None:
        return _TopK.apply(probs, topk)  # type: ignore[no-any-return]
    return torch.topk(probs, topk, dim=-1, sorted=False)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = _kernels().pick(probs.contiguous(), topk)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.num_experts = probs.shape[1]
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> Any:
        (indices,) = ctx.saved_tensors
        return (
            None if grad is None else _kernels().spread(grad.contiguous(), indices, ctx.num_experts),  # probs
            None,  # topk
        )


@functools.cache
def _kernels() -> Any:
    """Triton's; None without Triton, which PyTorch for CUDA brings along."""
    try:
        from megatron_ep_v2.kernels import topk_triton
    except ImportError as error:
        logger.warning("no Triton (%s): torch.topk finds each token's experts, more slowly", error)
        return None
    return topk_triton
