"""What the backwards of dispatch and combine share."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ep_v2.errors import EPError


class Like:
    """Shape, dtype and device of an output, to make its gradient where autograd has none: the backward is a collective,
    so a rank that used nothing of the output takes part with zeros."""

    def __init__(self, output: torch.Tensor):
        self.shape, self.dtype, self.device = output.shape, output.dtype, output.device

    def gradient(self, grad: torch.Tensor | None) -> torch.Tensor:
        """In the output's dtype, contiguous. grad: of the output; None = zeros."""
        if grad is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return grad.to(self.dtype).contiguous()


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
