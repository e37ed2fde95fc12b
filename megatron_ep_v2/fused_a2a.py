"""Fused all-to-all for Megatron-Core's flex token dispatcher: dispatch and combine with gradients, on any buffer.

Names and signatures are those of `megatron.core.transformer.moe.fused_a2a`, so that `install()` can bind them there.

    forward                        backward
    dispatch  x, probs  -> rows    combine(grad rows, topk_weights=grad probs)
    combine   rows      -> y       cached dispatch(grad y, handle)

Both can be started before their rows are asked for, where the buffer goes on without a wait (`start_dispatch`,
`start_combine`): what is queued in between, such as a shared expert, runs next to the transfer and to the wait for the
counts. Such a call is two nodes of the autograd graph, and so is its gradient's: the node that finishes the call in the
forward starts the other one in the backward, and the node that started it finishes that. What lies between them in the
order of the backward, such as the shared expert's own and the experts' weight gradients, runs next to it.

    start_dispatch x, probs -> token      finish: grad x, grad probs
    finish_dispatch   token -> rows       start:  combine(grad rows, topk_weights=grad probs)
    start_combine      rows -> token      finish: grad rows
    finish_combine    token -> y          start:  cached dispatch(grad y, handle)

A token has no elements: it only connects the two nodes.

One handle per layer and micro-batch, held only by the two autograd contexts that need it. The buffer is looked up once,
in forward, and kept on the context.

Both dispatches may carry 8 bits per element (settings `dispatch_dtype` and `grad_dispatch_dtype`): rows are quantised
before and dequantised after the dispatch, and the gradient treats both as the identity. Combines carry rows unchanged.

Megatron passes `async_finish` and `allocate_on_comm_stream`, and waits for the event immediately. Calls in stream
order give the same order with less work: the communication stream waits for the current one, which then waits for it,
while the host waits for neither. Memory of inputs and outputs belongs to the current stream, so it cannot be reused
before the communication has finished. Events and `record_stream` would cost time in every layer
(benchmarks/gpu_layer_cost.py measures it) and delay the reuse of freed memory.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2 import recompute, settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.contract import Buffer, Combined, DeferringBuffer, Dispatched, Handle, Payload
from megatron_ep_v2.buffers.pending import Pending
from megatron_ep_v2.buffers.pool import get_buffer
from megatron_ep_v2.gradients import (
    Context,
    HandleContext,
    InputGrads,
    Routings,
    first_order,
    save_handle,
    share_handle,
    take_handle,
    whole_gradient,
)
from megatron_ep_v2.probe import probe
from megatron_ep_v2.wire.quantize import from_wire, to_wire

HAVE_DEEP_EP: bool  # deep_ep imports here and has the legacy `Buffer`
HAVE_DEEP_EP_V2: bool  # deep_ep imports here and has `ElasticBuffer`

# Megatron-Core passes 20 if the user has not set it: moe_deepep_num_sms' default up to 0.18, a fallback since.
MEGATRON_DEFAULT_NUM_SMS = 20


def __getattr__(name: str) -> bool:
    """Probe HAVE_DEEP_EP and HAVE_DEEP_EP_V2 at first use, so that importing this module does not import deep_ep."""
    if name == "HAVE_DEEP_EP":
        return probe().have_deep_ep
    if name == "HAVE_DEEP_EP_V2":
        return probe().have_deep_ep_v2
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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


class _CombineContext(HandleContext, Protocol):
    buffer: Buffer | None  # None once the backward has run


class _DispatchContext(_CombineContext, Protocol):
    rows: tuple[torch.Size, torch.dtype, torch.device]  # of recv_x
    probs: tuple[torch.Size, torch.dtype, torch.device]  # of recv_probs


class _StartContext(Context, Protocol):
    call: Any  # the _InFlight of both nodes; None once the backward has run


class _FinishDispatchContext(_DispatchContext, _StartContext, Protocol):
    next_to_experts: bool


class _FinishCombineContext(_CombineContext, _StartContext, Protocol): ...


class FusedDispatch(torch.autograd.Function):
    """Dispatch; its backward is a combine that also carries the probabilities' gradient."""

    @staticmethod
    def forward(
        ctx: _DispatchContext,
        x: torch.Tensor,
        token_indices: torch.Tensor,
        token_probs: torch.Tensor,
        num_experts: int,
        group: ProcessGroup,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        do_expand: bool = False,
        expert_alignment: int = 1,
        do_cpu_sync: bool = True,
        keep_indices: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Handle]:
        """Return `(recv_x, recv_indices, recv_probs, handle)`; see `fused_dispatch`."""
        active, first = settings.active(), recompute.take()
        # A replayed handle's own: the group may have another buffer by now, to which the handle means nothing.
        buffer: Buffer | None = getattr(first, "carrier", None) or pool.find(group)
        buffer = buffer or get_buffer(group, x, token_indices, num_experts, token_probs)
        sent_probs, routings = token_probs, None
        payload = to_wire(x, active.dispatch_dtype)
        zero = do_expand and expert_alignment > 1
        if first is None:
            if not keep_indices and buffer.keeps_topk_idx:
                token_indices = token_indices.clone()
            dispatched = buffer.dispatch(
                payload,
                topk_idx=token_indices,
                topk_weights=token_probs,
                num_experts=num_experts,
                expert_alignment=expert_alignment,
                do_cpu_sync=do_cpu_sync,
                do_expand=do_expand,
                do_zero_padding=zero,
            )
        else:
            sent_probs = recompute.as_first(first, token_indices, token_probs, buffer)
            routings = first.topk_idx, token_indices
            dispatched = buffer.dispatch(
                payload,
                topk_weights=sent_probs,
                handle=first,
                num_sms=first.num_sms,
                do_expand=do_expand,
                do_zero_padding=zero,
            )
        if active.reuse_recompute_handle:
            recompute.note(buffer, dispatched[3], sent_probs)
        return _received(ctx, x.dtype, buffer, dispatched, routings)

    @staticmethod
    @first_order(linear=True)
    def backward(
        ctx: _DispatchContext,
        grad_rows: torch.Tensor | None,
        _idx: None,
        grad_probs: torch.Tensor | None,
        _handle: None,
    ) -> InputGrads:
        buffer, handle, routings = _taken(ctx)
        grads = whole_gradient(grad_rows, *ctx.rows), handle, whole_gradient(grad_probs, *ctx.probs)
        grad_x, grad_token_probs, _ = buffer.combine(*grads, num_sms=handle.num_sms)
        if routings is not None:
            assert grad_token_probs is not None  # because weights were sent
            grad_token_probs = recompute.grad_of_own(*routings, grad_token_probs)
        return (
            grad_x,  # x
            None,  # token_indices
            grad_token_probs,  # token_probs
            *[None] * 8,  # num_experts, group and what follows
        )


class FusedCombine(torch.autograd.Function):
    """Combine; its backward is a dispatch that repeats the handle's routing."""

    @staticmethod
    def forward(
        ctx: _CombineContext,
        x: torch.Tensor,
        group: ProcessGroup,
        handle: Handle,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, None]:
        buffer = _buffer_of(handle, group, x)
        combined_x, _, _ = buffer.combine(x, handle, num_sms=handle.num_sms)
        ctx.buffer = buffer
        share_handle(ctx, handle)
        return combined_x, None

    @staticmethod
    @first_order(linear=True)
    def backward(ctx: _CombineContext, grad: torch.Tensor, _event: None) -> InputGrads:
        buffer, handle, _ = _taken(ctx)
        payload, arguments = _grads_to_send(grad, handle)
        return (
            _grads_received(buffer.dispatch(payload, **arguments), grad.dtype),  # x
            *[None] * 4,  # group, handle, async_finish, allocate_on_comm_stream
        )


def _received(
    ctx: _DispatchContext,
    dtype: torch.dtype,
    buffer: Buffer,
    dispatched: Dispatched,
    routings: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Handle]:
    """What a dispatch's forward returns, with rows of a dtype; keeps what the backward needs."""
    received, recv_idx, recv_probs, handle, _ = dispatched
    recv_x = from_wire(received, settings.active().dispatch_dtype, dtype)
    assert recv_probs is not None  # because token_probs were sent
    ctx.buffer = vars(handle)["carrier"] = buffer
    save_handle(ctx, handle, routings)
    ctx.rows = recv_x.shape, recv_x.dtype, recv_x.device
    ctx.probs = recv_probs.shape, recv_probs.dtype, recv_x.device
    ctx.set_materialize_grads(False)  # else torch writes zeros for outputs without a gradient
    return recv_x, recv_idx, recv_probs, handle


def _taken(ctx: _CombineContext) -> tuple[Buffer, Handle, Routings | None]:
    """In a backward: buffer, handle and routings. The context drops them."""
    handle, routings = take_handle(ctx)
    buffer, ctx.buffer = ctx.buffer, None  # an output that the user keeps must not keep it
    assert buffer is not None  # a second backward has raised
    return buffer, handle, routings


def _buffer_of(handle: Handle, group: ProcessGroup, rows: torch.Tensor) -> Buffer:
    """The handle's own buffer: the group's may be a newer one, which does not know the handle."""
    buffer: Buffer | None = getattr(handle, "carrier", None) or pool.find(group)
    return buffer or get_buffer(group, rows, handle.topk_idx, handle.num_experts)


def _grads_to_send(grad: torch.Tensor, handle: Handle) -> tuple[Payload, dict[str, Any]]:
    """The payload of a combine's backward, and the arguments of its dispatch."""
    return to_wire(grad.contiguous(), settings.active().grad_dispatch_dtype), {
        "handle": handle,
        "num_sms": handle.num_sms,
        "do_expand": handle.do_expand,
        "do_zero_padding": handle.do_expand and handle.expert_alignment > 1,
    }


def _grads_received(dispatched: Dispatched, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of the rows that were combined."""
    received, _, _, handle, _ = dispatched
    rows = from_wire(received, settings.active().grad_dispatch_dtype, dtype)
    if torch.is_anomaly_enabled() and not handle.num_recv_tokens_per_expert_list:
        # Unowned rows may be NaN, which torch's anomaly mode would report.
        num_recv = handle.psum_num_recv_tokens_per_scaleup_rank[-1]
        rows.masked_fill_(torch.arange(len(rows), device=rows.device)[:, None] >= num_recv, 0)
    return rows


def fused_dispatch(
    x: torch.Tensor,
    token_indices: torch.Tensor,
    token_probs: torch.Tensor,
    num_experts: int,
    group: ProcessGroup,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
    *,
    do_expand: bool = False,
    expert_alignment: int = 1,
    do_cpu_sync: bool = True,
    keep_indices: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None, Handle]:
    """Send tokens to the ranks of their experts.

    Args:
        x: [T, H].
        token_indices: [T, K] int64 global expert ids, -1 = dropped.
        token_probs: [T, K] fp32.
        num_experts: Experts in the whole group.
        group: Process group of the experts.
        async_finish, allocate_on_comm_stream: Megatron's; see the module's docstring for why they change nothing.
        do_expand: Return rows sorted by local expert instead of one row per received token.
        expert_alignment: Pad each expert's rows to a multiple of this; in the expanded layout with zero rows.
        do_cpu_sync: False, compact only: no wait on the host, and W rows; see `buffers.contract`.
        keep_indices: The caller does not write to `token_indices` before the backward has run, so no buffer needs a
            copy of them (`buffers.contract.Buffer.keeps_topk_idx`).

    Returns:
        `(recv_x, recv_indices, recv_probs, tokens_per_expert, handle)`:
        compact [R, H], [R, K] int64 LOCAL ids or -1, [R, K] fp32; expanded [P, H], None, [P] fp32.
        tokens_per_expert: [L] int64 on the CPU, padded counts; None without a host wait.

    Raises:
        EPError: See `pool.get` and the buffer's own `dispatch`.
    """
    if settings.active().deterministic:
        (token_indices, token_probs), keep_indices = _in_expert_order(token_indices, token_probs), True
    recv_x, recv_idx, recv_probs, handle = FusedDispatch.apply(
        x.contiguous(),
        token_indices.contiguous(),
        token_probs.contiguous(),
        num_experts,
        group,
        async_finish,
        allocate_on_comm_stream,
        do_expand,
        expert_alignment,
        do_cpu_sync,
        keep_indices,
    )
    return recv_x, recv_idx, recv_probs, _counts(handle) if do_cpu_sync else None, handle


def _counts(handle: Handle) -> torch.Tensor:
    """[L] int64 on the CPU."""
    # Not torch.tensor(list), which takes three times as long and would delay the experts' first kernel.
    return torch.frombuffer(array("q", handle.num_recv_tokens_per_expert_list), dtype=torch.int64)


def _in_expert_order(token_indices: torch.Tensor, token_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """deep_ep sums a token's selections in column order, Megatron's unpermute in expert order."""
    token_indices, order = token_indices.sort(dim=1, stable=True)
    return token_indices, token_probs.gather(1, order)


def fused_combine(
    x: torch.Tensor,
    group: ProcessGroup,
    handle: Handle,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
) -> tuple[torch.Tensor, None]:
    """Send rows back to their tokens' ranks and sum them, unweighted.

    Args:
        x: [R, H] or [P, H], one row for each row from `fused_dispatch`.
        group: The dispatch's group.
        handle: The dispatch's handle.
        async_finish, allocate_on_comm_stream: As in `fused_dispatch`.

    Returns:
        `([T, H], None)`.
    """
    return FusedCombine.apply(x.contiguous(), group, handle)


def set_deepep_num_sms(num_sms: int) -> None:
    """Offer Megatron's SM count to the settings. Its default of 20 means "not set", and V2 then chooses a better one.

    Args:
        num_sms: SMs per kernel; 20 and 0 leave the choice to deep_ep. For exactly 20, set
            MCORE_DEEPEP_V2_NUM_SMS=20.
    """
    if num_sms != MEGATRON_DEFAULT_NUM_SMS:
        settings.offer("num_sms", num_sms, "Megatron's SM count")


# ------------------------------------------------------------------------------------------------------- started calls


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
        token_indices, token_probs = _in_expert_order(token_indices, token_probs)
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
    return recv_x, recv_probs, _counts(handle), handle


def start_combine(x: torch.Tensor, group: ProcessGroup, handle: Handle) -> StartedCombine | None:
    """Start a `fused_combine`, for `finish_combine`. Arguments as there.

    Returns:
        None if nothing was started: the buffer has no such call, or a checkpoint runs.

    Raises:
        EPError: See `fused_combine`.
    """
    x = x.contiguous()
    buffer = _buffer_of(handle, group, x)
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
        recv_x, _, recv_probs, handle = _received(ctx, token.dtype, call.buffer, call.pending.wait(), None)
        return recv_x, recv_probs, handle

    @staticmethod
    @first_order(linear=True)
    def backward(
        ctx: _FinishDispatchContext, grad_rows: torch.Tensor | None, grad_probs: torch.Tensor | None, _handle: None
    ) -> InputGrads:
        _, handle, _ = _taken(ctx)
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
    if rows.is_cuda:
        for each in (rows, probs):
            each.record_stream(torch.cuda.current_stream())
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
            _grads_received(_call(ctx).take_grads(), token.dtype),  # x
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
        _, handle, _ = _taken(ctx)
        payload, arguments = _grads_to_send(grad, handle)
        call = _call(ctx)
        call.grads = call.buffer.start_dispatch(payload, **arguments)
        return (
            None,  # call
            None,  # handle
            grad.new_empty(0),  # token
        )
