"""Fused all-to-all for Megatron-Core's flex token dispatcher: dispatch and combine with gradients, on any buffer.

Names and signatures are those of `megatron.core.transformer.moe.fused_a2a`, so that `install()` can bind them there.

    forward                        backward
    dispatch  x, probs  -> rows    combine(grad rows, topk_weights=grad probs)
    combine   rows      -> y       cached dispatch(grad y, handle)

`started_a2a` has the same calls in two halves, a start and a wait.

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
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2 import recompute, settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.contract import Buffer, Dispatched, Handle, Payload
from megatron_ep_v2.buffers.pool import get_buffer
from megatron_ep_v2.gradients import (
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


class CombineContext(HandleContext, Protocol):
    buffer: Buffer | None  # None once the backward has run


class DispatchContext(CombineContext, Protocol):
    rows: tuple[torch.Size, torch.dtype, torch.device]  # of recv_x
    probs: tuple[torch.Size, torch.dtype, torch.device]  # of recv_probs


class FusedDispatch(torch.autograd.Function):
    """Dispatch; its backward is a combine that also carries the probabilities' gradient."""

    @staticmethod
    def forward(
        ctx: DispatchContext,
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
        return received_rows(ctx, x.dtype, buffer, dispatched, routings)

    @staticmethod
    @first_order(linear=True)
    def backward(
        ctx: DispatchContext,
        grad_rows: torch.Tensor | None,
        _idx: None,
        grad_probs: torch.Tensor | None,
        _handle: None,
    ) -> InputGrads:
        buffer, handle, routings = take_saved(ctx)
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
        ctx: CombineContext,
        x: torch.Tensor,
        group: ProcessGroup,
        handle: Handle,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, None]:
        buffer = buffer_of(handle, group, x)
        combined_x, _, _ = buffer.combine(x, handle, num_sms=handle.num_sms)
        ctx.buffer = buffer
        share_handle(ctx, handle)
        return combined_x, None

    @staticmethod
    @first_order(linear=True)
    def backward(ctx: CombineContext, grad: torch.Tensor, _event: None) -> InputGrads:
        buffer, handle, _ = take_saved(ctx)
        payload, arguments = grads_to_send(grad, handle)
        return (
            received_grads(buffer.dispatch(payload, **arguments), grad.dtype),  # x
            *[None] * 4,  # group, handle, async_finish, allocate_on_comm_stream
        )


def received_rows(
    ctx: DispatchContext,
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


def take_saved(ctx: CombineContext) -> tuple[Buffer, Handle, Routings | None]:
    """In a backward: buffer, handle and routings. The context drops them."""
    handle, routings = take_handle(ctx)
    buffer, ctx.buffer = ctx.buffer, None  # an output that the user keeps must not keep it
    assert buffer is not None  # a second backward has raised
    return buffer, handle, routings


def buffer_of(handle: Handle, group: ProcessGroup, rows: torch.Tensor) -> Buffer:
    """The handle's own buffer: the group's may be a newer one, which does not know the handle."""
    buffer: Buffer | None = getattr(handle, "carrier", None) or pool.find(group)
    return buffer or get_buffer(group, rows, handle.topk_idx, handle.num_experts)


def grads_to_send(grad: torch.Tensor, handle: Handle) -> tuple[Payload, dict[str, Any]]:
    """The payload of a combine's backward, and the arguments of its dispatch."""
    return to_wire(grad.contiguous(), settings.active().grad_dispatch_dtype), {
        "handle": handle,
        "num_sms": handle.num_sms,
        "do_expand": handle.do_expand,
        "do_zero_padding": handle.do_expand and handle.expert_alignment > 1,
    }


def received_grads(dispatched: Dispatched, dtype: torch.dtype) -> torch.Tensor:
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
        (token_indices, token_probs), keep_indices = in_expert_order(token_indices, token_probs), True
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
    return recv_x, recv_idx, recv_probs, counts_of(handle) if do_cpu_sync else None, handle


def counts_of(handle: Handle) -> torch.Tensor:
    """[L] int64 on the CPU."""
    # Not torch.tensor(list), which takes three times as long and would delay the experts' first kernel.
    return torch.frombuffer(array("q", handle.num_recv_tokens_per_expert_list), dtype=torch.int64)


def in_expert_order(token_indices: torch.Tensor, token_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
