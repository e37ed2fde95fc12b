"""SwiGLU weighted by the router's probability: silu(gate) * up * prob, computed in fp32 (fp64 for fp64).

Rows from `used` on are unowned: they are not read, and zeros are written.

PyTorch, for every device; `swiglu_triton` is equal on CUDA tensors up to the last bit of exp and the order of sums.
"""

from __future__ import annotations

import torch

from megatron_ep_v2.kernels.move import accumulator


def forward(h: torch.Tensor, probs: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
    """Weighted SwiGLU.

    Args:
        h: [P, 2 * F]: gate in the first F columns, up in the others.
        probs: [P].
        used: One int32 on the device; None = all P rows are in use.

    Returns:
        [P, F] in h's dtype.
    """
    gate, up = h.to(accumulator(h)).chunk(2, dim=1)
    out = torch.nn.functional.silu(gate) * up * probs[:, None].to(gate.dtype)
    return zero_tail_(out.to(h.dtype), used)


def backward(
    grad: torch.Tensor, h: torch.Tensor, probs: torch.Tensor, used: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of h, [P, 2 * F], and of probs, [P]. grad: [P, F]."""
    gate, up = h.to(accumulator(h)).chunk(2, dim=1)
    grad = grad.to(gate.dtype)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    grad_probs = (grad * silu * up).sum(dim=1)
    grad = grad * probs[:, None].to(gate.dtype)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_h = torch.cat([grad_gate, grad * silu], dim=1).to(h.dtype)
    return zero_tail_(grad_h, used), zero_tail_(grad_probs.to(probs.dtype), used)


def zero_tail_(rows: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
    """Zero rows [P, ...] from `used` on, in place."""
    if used is not None:
        tail = torch.arange(len(rows), device=rows.device) >= used
        rows.masked_fill_(tail.view(-1, *[1] * (rows.dim() - 1)), 0)
    return rows
