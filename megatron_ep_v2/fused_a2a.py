"""Fused all-to-all for Megatron-Core's flex token dispatcher: dispatch and combine with gradients, on any buffer.

Names and signatures are those of `megatron.core.transformer.moe.fused_a2a`, so that `install()` can bind them there.

    forward                        backward
    dispatch  x, probs  -> rows    combine(grad rows, topk_weights=grad probs)
    combine   rows      -> y       cached dispatch(grad y, handle)

One handle per layer and micro-batch, held by the two autograd contexts that need it and by nobody else. The buffer is
looked up once, in forward, and kept on the context.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.contract import Buffer
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.probe import probe

HAVE_DEEP_EP: bool  # deep_ep imports here and has the legacy `Buffer`
HAVE_DEEP_EP_V2: bool  # deep_ep imports here and has `ElasticBuffer`

# Megatron-Core passes 20 when the user set nothing (moe_deepep_num_sms' default in 0.16-0.18, a fallback from 0.19 on).
MEGATRON_DEFAULT_NUM_SMS = 20


def __getattr__(name: str) -> Any:
    """HAVE_DEEP_EP and HAVE_DEEP_EP_V2, found out at first use: importing this module imports no deep_ep."""
    if name == "HAVE_DEEP_EP":
        return probe().have_legacy
    if name == "HAVE_DEEP_EP_V2":
        return probe().have_elastic
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_buffer(group: Any, x: torch.Tensor, token_indices: torch.Tensor, num_experts: int) -> Buffer:
    """The group's buffer for this payload. Collective the first time; see `pool.get` for what it raises.

    Args:
        group: Process group of the experts (in Megatron: tensor x expert parallel).
        x: [T, H].
        token_indices: [T, K].
        num_experts: Experts in the whole group.
    """
    return pool.get(
        group,
        hidden=x.shape[-1] if x.dim() else 0,
        num_topk=token_indices.shape[-1] if token_indices.dim() else 0,
        num_experts=num_experts,
        num_tokens=x.shape[0] if x.dim() else 0,
        payload=str(x.dtype),
    )


class FusedDispatch(torch.autograd.Function):
    """Dispatch; the gradient flows back through a combine that carries the probabilities' gradient along."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        token_indices: torch.Tensor,
        token_probs: torch.Tensor,
        num_experts: int,
        group: Any,
        async_finish: bool,
        allocate_on_comm_stream: bool,
        do_expand: bool,
        expert_alignment: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, Any]:
        buffer = get_buffer(group, x, token_indices, num_experts)
        recv_x, recv_idx, recv_probs, handle, event = buffer.dispatch(
            x,
            topk_idx=token_indices,
            topk_weights=token_probs,
            num_experts=num_experts,
            expert_alignment=expert_alignment,
            num_sms=settings.active().num_sms,
            do_expand=do_expand,
            do_zero_padding=do_expand and expert_alignment > 1,
            **_ordering(buffer, async_finish, allocate_on_comm_stream),
        )
        if async_finish:
            event.current_stream_wait()
        tokens_per_expert = torch.tensor(handle.num_recv_tokens_per_expert_list, dtype=torch.int64)
        ctx.buffer, ctx.handle = buffer, handle
        ctx.ordering = (async_finish, allocate_on_comm_stream)
        ctx.probs_dtype = token_probs.dtype
        ctx.mark_non_differentiable(tokens_per_expert, *(() if recv_idx is None else (recv_idx,)))
        assert isinstance(recv_x, torch.Tensor) and recv_probs is not None  # as x and token_probs were
        return recv_x, recv_idx, recv_probs, tokens_per_expert, handle

    @staticmethod
    def backward(
        ctx: Any, grad_x: torch.Tensor, _idx: Any, grad_probs: torch.Tensor, _counts: Any, _handle: Any
    ) -> Any:
        handle = _take_handle(ctx)
        grad_x, grad_probs, event = ctx.buffer.combine(
            grad_x.contiguous(),
            handle,
            topk_weights=grad_probs.to(ctx.probs_dtype).contiguous(),
            num_sms=handle.num_sms,
            **_ordering(ctx.buffer, *ctx.ordering),
        )
        if ctx.ordering[0]:
            event.current_stream_wait()
        return (
            grad_x,  # x
            None,  # token_indices
            grad_probs,  # token_probs
            *[None] * 6,  # num_experts, group, async_finish, allocate_on_comm_stream, do_expand, expert_alignment
        )


class FusedCombine(torch.autograd.Function):
    """Combine; the gradient flows back through a dispatch that repeats the handle's routing."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, buffer: Buffer, handle: Any, async_finish: bool, allocate_on_comm_stream: bool
    ) -> torch.Tensor:
        combined_x, _, event = buffer.combine(
            x, handle, num_sms=handle.num_sms, **_ordering(buffer, async_finish, allocate_on_comm_stream)
        )
        if async_finish:
            event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        ctx.ordering = (async_finish, allocate_on_comm_stream)
        return combined_x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        handle = _take_handle(ctx)
        grad_x, _, _, _, event = ctx.buffer.dispatch(
            grad.contiguous(),
            handle=handle,
            num_sms=handle.num_sms,
            do_expand=handle.do_expand,
            do_zero_padding=handle.do_expand and handle.expert_alignment > 1,
            **_ordering(ctx.buffer, *ctx.ordering),
        )
        if ctx.ordering[0]:
            event.current_stream_wait()
        return (
            grad_x,  # x
            *[None] * 4,  # buffer, handle, async_finish, allocate_on_comm_stream
        )


def fused_dispatch(
    x: torch.Tensor,
    token_indices: torch.Tensor,
    token_probs: torch.Tensor,
    num_experts: int,
    group: Any,
    async_finish: bool = False,
    allocate_on_comm_stream: bool = False,
    *,
    do_expand: bool = False,
    expert_alignment: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, Any]:
    """Send tokens to the ranks of their experts.

    Args:
        x: [T, H].
        token_indices: [T, K] int64 global expert ids, -1 = dropped.
        token_probs: [T, K] fp32.
        num_experts: Experts in the whole group.
        group: Process group of the experts.
        async_finish: Run on the communication stream; the current stream waits for the end, the host does not.
        allocate_on_comm_stream: Results belong to the communication stream.
        do_expand: Rows sorted by local expert instead of one row per received token.
        expert_alignment: Pad each expert's rows to a multiple of this; in the expanded layout with zero rows.

    Returns:
        `(recv_x, recv_indices, recv_probs, tokens_per_expert, handle)`:
        compact [R, H], [R, K] int64 LOCAL ids or -1, [R, K] fp32; expanded [P, H], None, [P] fp32.
        tokens_per_expert: [L] int64 on the CPU, padded counts.

    Raises:
        EPError: See `pool.get` and the buffer's own `dispatch`.
    """
    return FusedDispatch.apply(
        x.contiguous(),
        token_indices.contiguous(),
        token_probs.contiguous(),
        num_experts,
        group,
        async_finish,
        allocate_on_comm_stream,
        do_expand,
        expert_alignment,
    )


def fused_combine(
    x: torch.Tensor, group: Any, handle: Any, async_finish: bool = False, allocate_on_comm_stream: bool = False
) -> tuple[torch.Tensor, None]:
    """Send rows back to their tokens' ranks and add them up, unweighted.

    Args:
        x: [R, H] or [P, H], as `fused_dispatch` delivered them.
        group: The dispatch's group.
        handle: The dispatch's handle.
        async_finish, allocate_on_comm_stream: As in `fused_dispatch`.

    Returns:
        `([T, H], None)`.
    """
    buffer = get_buffer(group, x, handle.topk_idx, handle.num_experts)
    return FusedCombine.apply(x.contiguous(), buffer, handle, async_finish, allocate_on_comm_stream), None


def set_deepep_num_sms(num_sms: int) -> None:
    """Take Megatron's SM count. Its default of 20 stands for "not set", where V2 has a better answer of its own.

    Args:
        num_sms: SMs per kernel; 20 and 0 leave the choice to deep_ep. For exactly 20, set
            MCORE_DEEPEP_V2_NUM_SMS=20.
    """
    if num_sms != MEGATRON_DEFAULT_NUM_SMS:
        settings.offer("num_sms", num_sms, "Megatron's SM count")


def _ordering(buffer: Buffer, async_finish: bool, allocate_on_comm_stream: bool) -> dict[str, Any]:
    """Stream arguments of a call. An event to wait for needs results that belong to the communication stream."""
    return {
        "previous_event": buffer.capture() if async_finish and allocate_on_comm_stream else None,
        "async_with_compute_stream": async_finish,
        "allocate_on_comm_stream": async_finish and allocate_on_comm_stream,
    }


def _take_handle(ctx: Any) -> Any:
    """The context's handle, given up: it must not live on in a loss that the user keeps."""
    handle, ctx.handle = ctx.handle, None
    if handle is None:
        raise EPError(
            "backward ran a second time through one dispatch or combine",
            needed="one backward per forward; the handle is released with the first",
            fix="run the forward again instead of backward(retain_graph=True)",
        )
    return handle
