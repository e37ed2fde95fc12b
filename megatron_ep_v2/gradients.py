"""What the backwards of dispatch and combine share."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ep_v2.errors import EPError


def whole_gradient(
    grad: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An output's gradient, contiguous; zeros where autograd has none: the backward is a collective, in which a rank
    that used nothing of the output takes part.

    Args:
        grad: In the output's dtype, to which autograd brings it; None = the output was not used.
        shape, dtype, device: The output's.
    """
    if grad is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return grad.contiguous()


def take_handle(ctx: Any) -> Any:
    """The context's handle, given up: it must not live on in a loss that the user keeps. EPError if it has none."""
    handle, ctx.handle = ctx.handle, None
    if handle is None:
        raise EPError(
            "backward ran a second time through one dispatch or combine",
            needed="one backward per forward; the handle is released with the first",
            fix="run the forward again instead of backward(retain_graph=True)",
        )
    return handle
