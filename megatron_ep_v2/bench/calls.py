"""The communication of one layer with nothing around it: four raw calls of a buffer, or `fused_dispatch` and
`fused_combine`. Experts pass rows through, unweighted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ep_v2 import settings as settings_module
from megatron_ep_v2.buffers.contract import Payload
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.settings import Settings


class Layer(ABC):
    """A layer in two halves, as training runs many of them: all forward, then all backward. Called, it is one forward
    and its backward."""

    @abstractmethod
    def forward(self) -> Any:
        """Run one forward; what its backward needs."""

    @abstractmethod
    def backward(self, states: list[Any]) -> tuple[torch.Tensor, ...]:
        """Run the backwards of several forwards, the last one first.

        Returns:
            `(output [T, H], gradient of the hidden states [T, H], gradient of the weights [T, K])` of one of them.
        """

    def __call__(self) -> tuple[torch.Tensor, ...]:
        return self.backward([self.forward()])


def unwrapped(buffer: Any) -> Any:
    """deep_ep's own object in a buffer of this package; the reference, which is its own."""
    return getattr(buffer, "_buffer", buffer)


@dataclass(frozen=True, kw_only=True)
class RawCalls(Layer):
    """The four calls of one layer on a buffer: the floor of everything on that buffer.

    dispatch; combine; cached dispatch (the combine's backward); combine with weights (the dispatch's backward).

    Attributes:
        buffer: `deep_ep.ElasticBuffer` or a `contract.Buffer`.
        hidden: [T, H], or values and scales: what the dispatch sends.
        grad_output: [T, H], or values and scales: what the cached dispatch sends.
        topk_idx: [T, K] int64 expert ids.
        topk_weights: [T, K] fp32.
        num_experts: In the whole group.
        do_expand: The expanded layout.
        num_sms: SMs of each call; 0 = the library decides.
    """

    buffer: Any
    hidden: Payload
    grad_output: Payload
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    num_experts: int
    do_expand: bool
    num_sms: int = 0

    def dispatch(self) -> tuple[Any, torch.Tensor, Any]:
        """`(rows, row weights, handle)`: [R, H] and [R, K], or [P, H] and [P] in the expanded layout."""
        rows, _, row_weights, handle, _ = self.buffer.dispatch(
            self.hidden,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
            num_experts=self.num_experts,
            num_sms=self.num_sms,
            do_expand=self.do_expand,
        )
        return rows, row_weights, handle

    def combine(self, rows: torch.Tensor, handle: Any) -> torch.Tensor:
        """[T, H]."""
        return self.buffer.combine(rows, handle)[0]  # type: ignore[no-any-return]

    def cached_dispatch(self, handle: Any) -> Any:
        """The rows of `grad_output`."""
        rows, *_ = self.buffer.dispatch(
            self.grad_output, handle=handle, num_sms=handle.num_sms, do_expand=self.do_expand
        )
        return rows

    def combine_with_weights(
        self, rows: torch.Tensor, handle: Any, row_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`([T, H], [T, K] fp32)`."""
        y, weights, _ = self.buffer.combine(rows, handle, topk_weights=row_weights)
        return y, weights

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Dispatch and combine."""
        rows, row_weights, handle = self.dispatch()
        return self.combine(rows, handle), row_weights, handle

    def backward(self, states: list[Any]) -> tuple[torch.Tensor, ...]:
        """See `Layer`."""
        while states:
            y, row_weights, handle = states.pop()
            grad_hidden, grad_weights = self.combine_with_weights(self.cached_dispatch(handle), handle, row_weights)
        return y, grad_hidden, grad_weights


@dataclass(frozen=True, kw_only=True)
class FusedCalls(Layer):
    """`fused_dispatch` and `fused_combine`; the probabilities get gradients too.

    Attributes:
        group: Process group.
        hidden, grad_output: [T, H].
        topk_idx: [T, K] int64 expert ids.
        probs: [T, K] fp32.
        num_experts: In the whole group.
        do_expand: The expanded layout.
        settings: Activated before each forward; None = those that are active.
    """

    group: Any
    hidden: torch.Tensor
    grad_output: torch.Tensor
    topk_idx: torch.Tensor
    probs: torch.Tensor
    num_experts: int
    do_expand: bool
    settings: Settings | None = None

    def forward(self) -> Any:
        """Dispatch and combine."""
        if self.settings is not None:
            settings_module.activate(self.settings)
        # Leaves of its own: gradients of several layers are not added up.
        leaves = self.hidden.detach().requires_grad_(), self.probs.detach().requires_grad_()
        rows, _, row_probs, _, handle = fused_dispatch(
            leaves[0], self.topk_idx, leaves[1], self.num_experts, self.group, True, True, do_expand=self.do_expand
        )
        y, _ = fused_combine(rows, self.group, handle, True, True)
        return leaves, y, row_probs

    def backward(self, states: list[Any]) -> tuple[torch.Tensor, ...]:
        """See `Layer`. The loss is sum(y * grad_output) + sum(row probabilities ** 2) / 2."""
        ends = [end for _, y, row_probs in states for end in (y, row_probs)]
        torch.autograd.backward(
            ends, [grad for *_, row_probs in states for grad in (self.grad_output, row_probs.detach())]
        )
        (hidden, probs), y, _ = states[0]
        return y.detach(), hidden.grad, probs.grad
