"""Copies rows and weights to their slots and back, with gradients. One kernel each, forward and backward.

Slots are saved like activations, so that under a checkpoint the backward gets rows and slots of the same run.
"""

from __future__ import annotations

from types import ModuleType

import torch

from megatron_ep_v2.errors import InputError
from megatron_ep_v2.gradients import Context, InputGrads, first_order
from megatron_ep_v2.kernels import move
from megatron_ep_v2.kernels.select import kernels_for
from megatron_ep_v2.layouts.places import Places


def gather_rows(x: torch.Tensor, places: Places) -> torch.Tensor:
    """Copy received rows to their slots.

    Args:
        x: [R, H]. Rows without a slot are not read.

    Returns:
        [M, H], zero on padding. The gradient of x is the sum over a row's slots, in the order of k, in fp32; zero for
        rows without a slot.
    """
    _check_rows("received rows", x, places.slots.shape[0])
    return _Gather.apply(x, places)


def gather_weights(weights: torch.Tensor, places: Places) -> torch.Tensor:
    """Copy the weights of selections to their slots.

    Args:
        weights: [R, K]. Weights without a slot are not read.

    Returns:
        [M], zero on padding. The gradient is zero where a selection has no slot.
    """
    _check_weights(weights, places)
    return _Take.apply(weights, places)


def gather_with_weights(x: torch.Tensor, weights: torch.Tensor, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
    """`gather_rows(x, places)` and `gather_weights(weights, places)` in one kernel, forward and backward."""
    _check_rows("received rows", x, places.slots.shape[0])
    _check_weights(weights, places)
    return _GatherWithWeights.apply(x, weights, places)


def reduce_rows(y: torch.Tensor, places: Places, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum the experts' outputs of each row's selections, for `combine`.

    Args:
        y: [M, H], or [L, expected_m, H]. Padding is not read.
        weights: [R, K], a factor for each selection; None = 1.

    Returns:
        [R, H] in y's dtype, summed in the order of k in fp32 (fp64 for fp64). Rows without a slot, including those from
        `num_recv` on, are zero. The gradient of y is zero on padding.
    """
    y = y.flatten(0, -2)
    _check_rows("experts' rows", y, places.num_rows)
    if weights is None:
        return _Reduce.apply(y, places)
    _check_weights(weights, places)
    return _WeightedReduce.apply(y, weights, places)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, places: Places) -> torch.Tensor:
        ctx.save_for_backward(places.slots)
        return _mover(x).gather(x.contiguous(), places.rows)

    @staticmethod
    @first_order(linear=True)
    def backward(ctx: Context, grad: torch.Tensor) -> InputGrads:
        (slots,) = ctx.saved_tensors
        return (
            _mover(grad).reduce(grad.contiguous(), slots, None),  # x
            None,  # places
        )


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, weights: torch.Tensor, places: Places) -> torch.Tensor:
        ctx.save_for_backward(places.slots)
        return _mover(weights).take(weights.contiguous(), places.sources)

    @staticmethod
    @first_order(linear=True)
    def backward(ctx: Context, grad: torch.Tensor) -> InputGrads:
        (slots,) = ctx.saved_tensors
        return (
            _mover(grad).take(grad.contiguous(), slots),  # weights
            None,  # places
        )


class _GatherWithWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: torch.Tensor, weights: torch.Tensor, places: Places
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(places.slots)
        return _mover(x).gather_with_weights(x.contiguous(), weights.contiguous(), places.rows, places.sources)

    @staticmethod
    @first_order(linear=True)
    def backward(ctx: Context, grad: torch.Tensor, grad_weights: torch.Tensor) -> InputGrads:
        (slots,) = ctx.saved_tensors
        return (
            *_mover(grad).reduce_with_weights(grad.contiguous(), grad_weights.contiguous(), slots),  # x, weights
            None,  # places
        )


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, y: torch.Tensor, places: Places) -> torch.Tensor:
        ctx.save_for_backward(places.rows)
        return _mover(y).reduce(y.contiguous(), places.slots, None)

    @staticmethod
    @first_order(linear=True)
    def backward(ctx: Context, grad: torch.Tensor) -> InputGrads:
        (rows,) = ctx.saved_tensors
        return (
            _mover(grad).gather(grad.contiguous(), rows),  # y
            None,  # places
        )


class _WeightedReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, y: torch.Tensor, weights: torch.Tensor, places: Places) -> torch.Tensor:
        y, weights = y.contiguous(), weights.contiguous()
        ctx.save_for_backward(y, weights, places.rows, places.sources)
        return _mover(y).reduce(y, places.slots, weights)

    @staticmethod
    @first_order()
    def backward(ctx: Context, grad: torch.Tensor) -> InputGrads:
        y, weights, rows, sources = ctx.saved_tensors
        grad_y, grad_weights = _mover(grad).spread(grad.contiguous(), y, rows, sources, weights)
        return (
            grad_y,  # y
            grad_weights,  # weights
            None,  # places
        )


def _check_rows(name: str, rows: torch.Tensor, number: int) -> None:
    if rows.dim() != 2 or rows.shape[0] != number:
        raise InputError(
            f"the {name} do not fit their slots",
            found=str(tuple(rows.shape)),
            needed=f"({number}, hidden)",
            fix="pass all rows of the dispatch, or of the experts, that these Places were made for, in their order",
        )


def _check_weights(weights: torch.Tensor, places: Places) -> None:
    if weights.shape != places.slots.shape:
        raise InputError(
            "the weights do not fit their slots",
            found=str(tuple(weights.shape)),
            needed=f"{tuple(places.slots.shape)}, one for each selection",
            fix="pass the recv_topk_weights of the compact dispatch that these Places were made for",
        )


def _mover(rows: torch.Tensor) -> ModuleType:
    """The module with `gather`, `take`, `reduce` and `spread` for this device."""
    return kernels_for(rows, move, "layouts")
