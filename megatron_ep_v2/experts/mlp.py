"""A SwiGLU MLP of several experts on rows sorted by expert, with gradients.

    h = x @ w1.T [P, 2 * F]  ->  a = silu(gate) * up * prob [P, F]  ->  y = a @ w2.T [P, H]

Five kernels forward (two GEMMs, one activation, two that clear rows of nobody) or three where the host knows that there
are no such rows. What such rows hold reaches neither a weight's gradient nor another row: GEMMs skip them, and where a
kernel has to write them, it writes zeros.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_ep_v2.errors import InputError, UnavailableError
from megatron_ep_v2.experts.gemm import Gemm, gemm
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.kernels import swiglu
from megatron_ep_v2.layouts.places import place_contiguous, rows_that_fit
from megatron_ep_v2.layouts.rows import gather_rows, gather_weights, reduce_rows


def swiglu_experts(
    x: torch.Tensor, probs: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, groups: Groups, backend: str
) -> torch.Tensor:
    """
    Args:
        x: [P, H].
        probs: [P], of a floating dtype: a factor for each row.
        w1: [L, 2 * F, H]: the gate's rows first, then up's.
        w2: [L, H, F].
        groups: Of the rows.
        backend: `deepgemm`, `grouped` or `sequential`. Where it needs padded experts and these are not, rows are moved
            once there and once back.

    Returns:
        [P, H]; rows that belong to nobody are zero.

    Raises:
        EPError: The backend cannot run here, or not with these dtypes and sizes.
    """
    fits = x.dim() == 2 and probs.shape == x.shape[:1] and len(w1) == len(w2) == len(groups.ends)
    if not fits or w1.shape[1:] != (2 * w2.shape[2], x.shape[1]) or w2.shape[1] != x.shape[1]:
        raise InputError(
            "these are not the rows and weights of SwiGLU experts",
            found=f"rows {tuple(x.shape)}, probs {tuple(probs.shape)}, weights {tuple(w1.shape)} and "
            f"{tuple(w2.shape)}, {len(groups.ends)} groups",
            needed="[P, H], [P], [L, 2 * F, H], [L, H, F], L",
            fix="pass the rows and probabilities of one dispatch, its groups, and this rank's own experts",
        )
    chosen = gemm(backend)
    chosen.check(x, w1)
    chosen.check(x, w2)
    if groups.alignment % chosen.alignment:
        return _padded(x, probs, w1, w2, groups, backend, chosen.alignment)
    h = _Linear.apply(x, w1, groups, chosen, False)
    activated = _WeightedSwiglu.apply(h, probs, groups.used)
    return _Linear.apply(activated, w2, groups, chosen, True)  # type: ignore[no-any-return]


def _padded(
    x: torch.Tensor,
    probs: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    groups: Groups,
    backend: str,
    alignment: int,
) -> torch.Tensor:
    """With each expert's rows moved apart to a multiple of `alignment`."""
    place = torch.arange(len(x), dtype=torch.int32, device=x.device)
    expert = torch.searchsorted(groups.ends, place, right=True)[:, None]  # L = nobody's
    if groups.sizes is None:
        num_rows = rows_that_fit(len(x), len(groups.ends), alignment)
    else:
        num_rows = sum(-(-size // alignment) * alignment for size in groups.sizes)
    places = place_contiguous(expert, None, len(groups.ends), num_rows, alignment)
    rows, row_probs = gather_rows(x, places), gather_weights(probs[:, None], places)
    y = swiglu_experts(rows, row_probs, w1, w2, Groups.from_places(places), backend)
    return reduce_rows(y, places)


class _Linear(torch.autograd.Function):
    """x [P, K], w [L, N, K] -> [P, N]. Rows of nobody are zeroed where they leave the block: in the output of the last
    linear, and in the first one's gradient of x. Between the two the activation does it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, groups: Groups, multiply: Gemm, last: bool) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, w)
        ctx.groups, ctx.gemm, ctx.last = groups, multiply, last
        y = multiply.forward(x, w, groups)
        return _kernels(y).zero_tail_(y, groups.used) if last else y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        grad, grad_x, grad_w = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.gemm.dgrad(grad, w, ctx.groups)
            if not ctx.last:
                grad_x = _kernels(grad_x).zero_tail_(grad_x, ctx.groups.used)
        if ctx.needs_input_grad[1]:
            grad_w = ctx.gemm.wgrad(grad, x, ctx.groups)
        return (
            grad_x,  # x
            grad_w,  # w
            *[None] * 3,  # groups, gemm, last
        )


class _WeightedSwiglu(torch.autograd.Function):
    """h [P, 2 * F], probs [P] -> [P, F]."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, probs: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
        probs = probs.contiguous()
        ctx.save_for_backward(h, probs)
        ctx.used = used
        return _kernels(h).forward(h, probs, used)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        h, probs = ctx.saved_tensors
        grad_h, grad_probs = _kernels(h).backward(grad.contiguous(), h, probs, ctx.used)
        return (
            grad_h,  # h
            grad_probs,  # probs
            None,  # used
        )


def _kernels(rows: torch.Tensor) -> Any:
    """The module with `forward`, `backward` and `zero_tail_` for this device."""
    if not rows.is_cuda:
        return swiglu
    try:
        from megatron_ep_v2.kernels import swiglu_triton
    except ImportError as error:
        raise UnavailableError(
            "experts on GPUs need Triton", found=str(error), needed="3.3 or newer", fix="pip install 'triton>=3.3'"
        ) from error
    return swiglu_triton
