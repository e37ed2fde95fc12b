"""Dispatch and combine in two halves, a start and a wait, with gradients: `fused_a2a` on a buffer that goes on without
a wait (`buffers.contract.DeferringBuffer`).

What is queued between the halves, such as a shared expert, runs next to the transfer and to the wait for the counts. A
call is two nodes of the autograd graph, and so is its gradient's: the node that finishes the call in the forward starts
the other one in the backward, and the node that started it finishes that. What lies between them in the order of the
backward, such as the shared expert's own and the experts' weight gradients, runs next to it.

    start_dispatch x, probs -> token      finish: grad x, grad probs
    finish_dispatch   token -> rows       start:  combine(grad rows, topk_weights=grad probs)
    start_combine      rows -> token      finish: grad rows
    finish_combine    token -> y          start:  cached dispatch(grad y, handle)

A token has no elements: it only connects the two nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2 import recompute, settings, streams
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.contract import Buffer, Combined, DeferringBuffer, Dispatched, Handle
from megatron_ep_v2.buffers.pending import Pending
from megatron_ep_v2.buffers.pool import get_buffer
from megatron_ep_v2.fused_a2a import (
    CombineContext,
    DispatchContext,
    buffer_of,
    counts_of,
    grads_to_send,
    in_expert_order,
    received_grads,
    received_rows,
    take_saved,
)
from megatron_ep_v2.gradients import Context, InputGrads, first_order, share_handle, whole_gradient
from megatron_ep_v2.wire.quantize import to_wire

Forward = TypeVar("Forward")
Backward = TypeVar("Backward")


@dataclass(eq=False)
class _InFlight(Generic[Forward, Backward]):
    """What the two nodes of a started call share. Has no tensor of the graph, which would keep itself alive.

    Attributes:
        buffer: Of the call.
        pending: The forward's call.
        grads: The backward's, once it has been started.
    """

    buffer: DeferringBuffer
    pending: Pending[Forward]
    grads: Pending[Backward] | None = None

    def take_grads(self) -> Backward:
        """Wait for the backward's call."""
        grads, self.grads = self.grads, None
        assert grads is not None  # the other node has started it
        return grads.wait()


@dataclass(frozen=True, eq=False)
class StartedDispatch:
    """A dispatch whose rows the host has not asked for yet. Its inputs must not change until then.

    Attributes:
        token, probs_token: [0], of the dtypes of rows and probabilities; see the module's docstring.
        next_to_experts: See `start_dispatch`.
        call: In flight.
    """

    token: torch.Tensor
    probs_token: torch.Tensor
    next_to_experts: bool
    call: _InFlight[Dispatched, Combined]


@dataclass(frozen=True, eq=False)
class StartedCombine:
    """A combine whose sums the host has not asked for yet. Its rows must not change until then.

    Attributes:
        token: [0], of the rows' dtype; see the module's docstring.
        handle: Of the dispatch.
        call: In flight.
    """

    token: torch.Tensor
    handle: Handle
    call: _InFlight[Combined, Dispatched]


class _StartContext(Context, Protocol):
    call: Any  # the _InFlight of both nodes; None once the backward has run


class _FinishDispatchContext(DispatchContext, _StartContext, Protocol):
    next_to_experts: bool


class _FinishCombineContext(CombineContext, _StartContext, Protocol): ...


def start_dispatch(
    x: torch.Tensor,
    token_indices: torch.Tensor,
    token_probs: torch.Tensor,
    num_experts: int,
    group: ProcessGroup,
    *,
    expert_alignment: int = 1,
    keep_indices: bool = False,
    next_to_experts: bool = True,
) -> StartedDispatch | None:
    """Start a `fused_dispatch` in the expanded layout, for `finish_dispatch`. Arguments as there.

    Args:
        next_to_experts: Start the backward when it has the gradients of the rows. False: run it as a whole where it
            would finish, for a schedule that runs the part of the graph before `finish_dispatch` when it chooses.

    Returns:
        None if nothing was started: the buffer has no such call, or a checkpoint keeps or replays the handle.

    Raises:
        EPError: See `fused_dispatch`.
    """
    active = settings.active()
    if recompute.in_checkpoint():
        return None
    x, token_probs = x.contiguous(), token_probs.contiguous()
    buffer = pool.find(group) or get_buffer(group, x, token_indices, num_experts, token_probs)
    if not buffer.defers:
        return None
    if active.deterministic:
        token_indices, token_probs = in_expert_order(token_indices, token_probs)
    elif not keep_indices and buffer.keeps_topk_idx:
        token_indices = token_indices.clone()
    deferring = cast(DeferringBuffer, buffer)
    with torch.no_grad():
        pending = deferring.start_dispatch(
            to_wire(x, active.dispatch_dtype),
            topk_idx=token_indices.contiguous(),
            topk_weights=token_probs,
            num_experts=num_experts,
            expert_alignment=expert_alignment,
            do_expand=True,
            do_zero_padding=expert_alignment > 1,
        )
    call: _InFlight[Dispatched, Combined] = _InFlight(deferring, pending)
    token, probs_token = _StartDispatch.apply(call, x, token_probs)
    return StartedDispatch(token, probs_token, next_to_experts, call)


def finish_dispatch(
    started: StartedDispatch, token: torch.Tensor | None = None, probs_token: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Handle]:
    """Wait for a started dispatch.

    Args:
        token, probs_token: Those of `started`, or what has become of them; None = those of `started`.

    Returns:
        `(recv_x, recv_probs, tokens_per_expert, handle)`: [P, H], [P] fp32, [L] int64 on the CPU.

    Raises:
        EPError: See `fused_dispatch`.
    """
    recv_x, recv_probs, handle = _FinishDispatch.apply(
        started.call,
        started.next_to_experts,
        started.token if token is None else token,
        started.probs_token if probs_token is None else probs_token,
    )
    return recv_x, recv_probs, counts_of(handle), handle


def start_combine(x: torch.Tensor, group: ProcessGroup, handle: Handle) -> StartedCombine | None:
    """Start a `fused_combine`, for `finish_combine`. Arguments as there.

    Returns:
        None if nothing was started: the buffer has no such call, or a checkpoint runs.

    Raises:
        EPError: See `fused_combine`.
    """
    x = x.contiguous()
    buffer = buffer_of(handle, group, x)
    if recompute.in_checkpoint() or not buffer.defers:
        return None
    deferring = cast(DeferringBuffer, buffer)
    call: _InFlight[Combined, Dispatched] = _InFlight(
        deferring, deferring.start_combine(x.detach(), handle, num_sms=handle.num_sms)
    )
    return StartedCombine(_StartCombine.apply(call, x), handle, call)


def finish_combine(started: StartedCombine) -> torch.Tensor:
    """Wait for a started combine; returns [T, H]."""
    return _FinishCombine.apply(started.call, started.handle, started.token)


def _call(ctx: _StartContext) -> _InFlight[Any, Any]:
    """In a backward: the call. The context drops it, as `_taken` does the buffer."""
    call: _InFlight[Any, Any] = ctx.call
    ctx.call = None
    return call


class _StartDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _StartContext, call: _InFlight[Dispatched, Combined], x: torch.Tensor, token_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.call = call
        return x.new_empty(0), token_probs.new_empty(0)

    @staticmethod
    @first_order(linear=True)
    def backward(ctx: _StartContext, _token: torch.Tensor, _probs: torch.Tensor) -> InputGrads:
        grad_x, grad_token_probs, _ = _call(ctx).take_grads()
        return (
            None,  # call
            grad_x,  # x
            grad_token_probs,  # token_probs
        )


class _FinishDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _FinishDispatchContext,
        call: _InFlight[Dispatched, Combined],
        next_to_experts: bool,
        token: torch.Tensor,
        probs_token: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, Handle]:
        ctx.call, ctx.next_to_experts = call, next_to_experts
        recv_x, _, recv_probs, handle = received_rows(ctx, token.dtype, call.buffer, call.pending.wait(), None)
        return recv_x, recv_probs, handle

    @staticmethod
    @first_order(linear=True)
    def backward(
        ctx: _FinishDispatchContext, grad_rows: torch.Tensor | None, grad_probs: torch.Tensor | None, _handle: None
    ) -> InputGrads:
        _, handle, _ = take_saved(ctx)
        call, rows = _call(ctx), whole_gradient(grad_rows, *ctx.rows)
        grads = rows, handle, whole_gradient(grad_probs, *ctx.probs)
        if ctx.next_to_experts:
            call.grads = call.buffer.start_combine(*grads, num_sms=handle.num_sms)
        else:
            call.grads = Pending(lambda: _on_this_stream(call.buffer, grads))
        return (
            None,  # call
            None,  # next_to_experts
            rows.new_empty(0),  # token
            grads[2].new_empty(0),  # probs_token
        )


def _on_this_stream(buffer: Buffer, grads: tuple[torch.Tensor, Handle, torch.Tensor]) -> Combined:
    """A dispatch's backward, with gradients that another stream has made, before which this one has waited."""
    rows, handle, probs = grads
    streams.record([rows, probs])
    return buffer.combine(rows, handle, probs, num_sms=handle.num_sms)


class _StartCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _StartContext, call: _InFlight[Combined, Dispatched], x: torch.Tensor) -> torch.Tensor:
        ctx.call = call
        return x.new_empty(0)

    @staticmethod
    @first_order(linear=True)
    def backward(ctx: _StartContext, token: torch.Tensor) -> InputGrads:
        return (
            None,  # call
            received_grads(_call(ctx).take_grads(), token.dtype),  # x
        )


class _FinishCombine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _FinishCombineContext, call: _InFlight[Combined, Dispatched], handle: Handle, token: torch.Tensor
    ) -> torch.Tensor:
        ctx.call, ctx.buffer = call, call.buffer
        share_handle(ctx, handle)
        return call.pending.wait()[0]

    @staticmethod
    @first_order(linear=True)
    def backward(ctx: _FinishCombineContext, grad: torch.Tensor) -> InputGrads:
        _, handle, _ = take_saved(ctx)
        payload, arguments = grads_to_send(grad, handle)
        call = _call(ctx)
        call.grads = call.buffer.start_dispatch(payload, **arguments)
        return (
            None,  # call
            None,  # handle
            grad.new_empty(0),  # token
        )
