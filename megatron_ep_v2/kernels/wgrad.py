"""Weight gradients of a linear layer of several experts, added to a gradient buffer:

    out[l] += grad[rows of l].T @ x[rows of l]

Nothing is read, written or zeroed for an expert without rows; but where the buffer is overwritten, it gets zeros.
PyTorch, for the CPU and for fp64; `wgrad_triton` does
the same on CUDA tensors. Both sum in fp32 (fp64 for fp64) and round once.
"""

from __future__ import annotations

import sys

import torch

from megatron_ep_v2.errors import InputError
from megatron_ep_v2.kernels.move import accumulator
from megatron_ep_v2.kernels.select import kernels_for


def add_(out: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, overwrite: bool = False) -> None:
    """Add weight gradients to `out` in place.

    Args:
        out: [L, N, K], contiguous.
        grad: [P, N], contiguous.
        x: [P, K], contiguous.
        ends: [L] int32 on the same device: where each expert's rows end. Rows past the last end are not read.
        overwrite: Replace what is in `out`, which is not read and may be uninitialised.

    Raises:
        InputError: `out` is not one contiguous [L, N, K].
        UnavailableError: CUDA tensors, and no Triton.
    """
    if out.shape != (ends.shape[0], grad.shape[1], x.shape[1]) or not out.is_contiguous():
        raise InputError(
            "weight gradients do not fit the buffer that they are added to",
            found=f"main_grad {tuple(out.shape)} with strides {out.stride()}",
            needed=f"({len(ends)}, {grad.shape[1]}, {x.shape[1]}), contiguous",
            fix="turn gradient_accumulation_fusion off (--no-gradient-accumulation-fusion)",
        )
    if not out.is_cpu and grad.dtype != torch.float64:
        kernels_for(out, sys.modules[__name__], "experts").add_(out, grad, x, ends, overwrite)
        return
    kind, start = accumulator(grad), 0
    for mine, end in zip(out, ends.tolist(), strict=True):
        if overwrite:
            mine.copy_(grad[start:end].to(kind).t() @ x[start:end].to(kind))
        elif end > start:
            mine.add_(grad[start:end].to(kind).t() @ x[start:end].to(kind))
        start = end
