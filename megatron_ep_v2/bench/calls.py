"""The communication of one layer with nothing around it: four raw calls of a buffer, or `fused_dispatch` and
`fused_combine`. Experts pass rows through, unweighted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2 import settings as settings_module
from megatron_ep_v2.buffers.contract import Buffer, Handle, Payload
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.settings import Settings

S = TypeVar("S")


class Layer(ABC, Generic[S]):
    """A layer in two halves, as training runs many of them: all forward, then all backward. Called, it is one forward
    and its backward."""

    @abstractmethod
    def forward(self) -> S:
        """Run one forward; what its backward needs."""

    @abstractmethod
    def backward(self, states: list[S]) -> tuple[torch.Tensor | None, ...]:
        """Run the backwards of several forwards, the last one first.

        Returns:
            `(output [T, H], gradient of the hidden states [T, H], gradient of the weights [T, K])` of one of them.
        """

    def __call__(self) -> tuple[torch.Tensor | None, ...]:
        return self.backward([self.forward()])


def unwrapped(buffer: Buffer) -> Any:
    """deep_ep's own object in a buffer of this package, of a class without types; the reference, which is its own."""
    return getattr(buffer, "_buffer", buffer)


RawState: TypeAlias = tuple[torch.Tensor, torch.Tensor | None, Handle]  # output, weights of the rows, handle


@dataclass(frozen=True, kw_only=True)
class RawCalls(Layer[RawState]):
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

    buffer: Buffer
    hidden: Payload
    grad_output: Payload
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    num_experts: int
    do_expand: bool
    num_sms: int = 0

    def dispatch(self) -> tuple[Any, torch.Tensor | None, Handle]:
        """`(rows, row weights, handle)`: [R, H] and [R, K], or [P, H] and [P] in the expanded layout. Rows have the
        type of `hidden`."""
        rows, _, row_weights, handle, _ = self.buffer.dispatch(
            self.hidden,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
            num_experts=self.num_experts,
            num_sms=self.num_sms,
            do_expand=self.do_expand,
        )
        return rows, row_weights, handle

    def combine(self, rows: torch.Tensor, handle: Handle) -> torch.Tensor:
        """[T, H]."""
        return self.buffer.combine(rows, handle)[0]

    def cached_dispatch(self, handle: Handle) -> Any:
        """The rows of `grad_output`, of its type."""
        rows, *_ = self.buffer.dispatch(
            self.grad_output, handle=handle, num_sms=handle.num_sms, do_expand=self.do_expand
        )
        return rows

    def combine_with_weights(
        self, rows: torch.Tensor, handle: Handle, row_weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`([T, H], [T, K] fp32)`."""
        y, weights, _ = self.buffer.combine(rows, handle, topk_weights=row_weights)
        return y, weights

    def forward(self) -> RawState:
        """Dispatch and combine."""
        rows, row_weights, handle = self.dispatch()
        return self.combine(rows, handle), row_weights, handle

    def backward(self, states: list[RawState]) -> tuple[torch.Tensor | None, ...]:
        """See `Layer`."""
        while states:
            y, row_weights, handle = states.pop()
            grad_hidden, grad_weights = self.combine_with_weights(self.cached_dispatch(handle), handle, row_weights)
        return y, grad_hidden, grad_weights


# A forward's own leaves, hidden states and probabilities; its output; the rows' probabilities.
FusedState: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class FusedCalls(Layer[FusedState]):
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

    group: ProcessGroup
    hidden: torch.Tensor
    grad_output: torch.Tensor
    topk_idx: torch.Tensor
    probs: torch.Tensor
    num_experts: int
    do_expand: bool
    settings: Settings | None = None

    def forward(self) -> FusedState:
        """Dispatch and combine."""
        if self.settings is not None:
            settings_module.activate(self.settings)
        # Leaves of its own: gradients of several layers are not added up.
        hidden, probs = self.hidden.detach().requires_grad_(), self.probs.detach().requires_grad_()
        rows, _, row_probs, _, handle = fused_dispatch(
            *(hidden, self.topk_idx, probs, self.num_experts, self.group, True, True),
            do_expand=self.do_expand,
            keep_indices=True,  # as in Megatron's layers
        )
        y, _ = fused_combine(rows, self.group, handle, True, True)
        return hidden, probs, y, row_probs

    def backward(self, states: list[FusedState]) -> tuple[torch.Tensor | None, ...]:
        """See `Layer`. The loss is sum(y * grad_output) + sum(row probabilities ** 2) / 2."""
        ends = [end for *_, y, row_probs in states for end in (y, row_probs)]
        torch.autograd.backward(
            ends, [grad for *_, row_probs in states for grad in (self.grad_output, row_probs.detach())]
        )
        hidden, probs, y, _ = states[0]
        return y.detach(), hidden.grad, probs.grad
