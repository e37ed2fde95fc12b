"""A SwiGLU MLP of several experts on rows sorted by expert, with gradients.

    h = x @ w1.T [P, 2 * F]  ->  a = silu(gate) * up * prob [P, F]  ->  y = a @ w2.T [P, H]

Four kernels forward (two GEMMs, one activation, one that clears rows of no expert) or three where the host knows that
there are no such rows. What such rows hold reaches neither a weight's gradient nor another row: GEMMs skip them, and
where a kernel has to write them, it writes zeros.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_ep_v2.errors import InputError
from megatron_ep_v2.experts.gemm import Gemm, gemm
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.gradients import first_order
from megatron_ep_v2.kernels import swiglu, wgrad
from megatron_ep_v2.kernels.select import kernels_for
from megatron_ep_v2.layouts.places import place_contiguous, rows_that_fit
from megatron_ep_v2.layouts.rows import gather_rows, gather_weights, reduce_rows


class Linear(Protocol):
    """A linear layer of several experts: `linear` with the weights given, or the module that owns them."""

    @property
    def weight(self) -> torch.Tensor:
        """[L, N, K]."""

    def __call__(
        self,
        x: torch.Tensor,
        groups: Groups,
        multiply: Gemm,
        last: bool,
        activation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Weights:
    """The linear layer of a plain tensor, [L, N, K]."""

    weight: torch.Tensor

    def __call__(
        self,
        x: torch.Tensor,
        groups: Groups,
        multiply: Gemm,
        last: bool,
        activation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        return linear(x, self.weight, groups, multiply, last, activation)


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
        [P, H]; rows that belong to no expert are zero.

    Raises:
        EPError: The backend cannot run here, or not with these dtypes and sizes.
    """
    return run_experts(x, probs, Weights(w1), Weights(w2), groups, backend)


def run_experts(
    x: torch.Tensor,
    probs: torch.Tensor,
    fc1: Linear,
    fc2: Linear,
    groups: Groups,
    backend: str,
    recompute_activation: bool = False,
) -> torch.Tensor:
    """`swiglu_experts` through linear layers that own their weights.

    Whoever owns a parameter has to be called for it: Megatron's DDP gathers a parameter in a hook before its module's
    forward (`--overlap-param-gather`).

    Args:
        recompute_activation: Compute the activation again in backward instead of keeping it: P * F elements less.
    """
    w1, w2 = fc1.weight, fc2.weight
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
        return _padded(x, probs, fc1, fc2, groups, backend, chosen.alignment, recompute_activation)
    h = fc1(x, groups, chosen, False)
    activated = _WeightedSwiglu.apply(h, probs, groups.used)
    return fc2(activated, groups, chosen, True, (h, probs) if recompute_activation else None)


def _padded(
    x: torch.Tensor,
    probs: torch.Tensor,
    fc1: Linear,
    fc2: Linear,
    groups: Groups,
    backend: str,
    alignment: int,
    recompute_activation: bool,
) -> torch.Tensor:
    """With each expert's rows moved apart to a multiple of `alignment`."""
    place = torch.arange(len(x), dtype=torch.int32, device=x.device)
    expert = torch.searchsorted(groups.ends, place, right=True)[:, None]  # L = no expert's
    if groups.sizes is None:
        num_rows = rows_that_fit(len(x), len(groups.ends), alignment)
    else:
        num_rows = sum(-(-size // alignment) * alignment for size in groups.sizes)
    places = place_contiguous(expert, None, len(groups.ends), num_rows, alignment)
    rows, row_probs = gather_rows(x, places), gather_weights(probs[:, None], places)
    y = run_experts(rows, row_probs, fc1, fc2, Groups.from_places(places), backend, recompute_activation)
    return reduce_rows(y, places)


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    groups: Groups,
    multiply: Gemm,
    last: bool,
    activation: tuple[torch.Tensor, torch.Tensor] | None = None,
    main_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row with its own expert's weights.

    Args:
        x: [P, K].
        w: [L, N, K].
        groups: Of the rows.
        multiply: The backend.
        last: The second linear of the two: its output has zeros in rows that belong to no expert.
        activation: What `x` was made from, h [P, 2 * K] and probs [P], where it is not to be kept for backward.
        main_grad: [L, N, K], fp32 or w's dtype. Backward adds the gradient of `w` to it, in fp32 inside, and autograd
            gets none: the convention of Megatron's `gradient_accumulation_fusion`, which its DDP reads. None = the
            gradient goes to autograd.

    Returns:
        [P, N].
    """
    return _Linear.apply(x, w, groups, multiply, last, main_grad, *(activation or ()))  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """Rows of no expert are zeroed where they leave the block: in the output of the last linear, and in the first one's
    gradient of x. Between the two the activation does it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        groups: Groups,
        multiply: Gemm,
        last: bool,
        main_grad: torch.Tensor | None,
        *activation: torch.Tensor,
    ) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(w, groups.ends, *(activation or (x,)))
        ctx.groups, ctx.gemm, ctx.last = groups, multiply, last
        # The parameter itself: what saved-tensor hooks (activation offload) give back may be a copy without attributes.
        ctx.parameter, ctx.main_grad = (w, main_grad) if main_grad is not None else (None, None)
        y = multiply.forward(x, w, groups)
        return _kernels(y).zero_tail_(y, groups.used) if last else y  # type: ignore[no-any-return]

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        w, ends, *kept = ctx.saved_tensors
        groups = ctx.groups.of_run(ends)
        grad, grad_x, grad_w = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.gemm.dgrad(grad, w, groups)
            if not ctx.last:
                grad_x = _kernels(grad_x).zero_tail_(grad_x, groups.used)
        if ctx.needs_input_grad[1]:
            x = kept[0] if len(kept) == 1 else _kernels(grad).forward(*kept, groups.used)
            if ctx.main_grad is None:
                grad_w = ctx.gemm.wgrad(grad, x, groups)
            else:
                wgrad.add_(ctx.main_grad, grad, x, groups.ends)
                _mark_added(ctx.parameter)
        return (
            grad_x,  # x
            grad_w,  # w
            *[None] * 4,  # groups, gemm, last, main_grad
            *[None] * (len(kept) if len(kept) > 1 else 0),  # activation: its gradient flows through x
        )


def _mark_added(parameter: torch.Tensor) -> None:
    """Tell Megatron's DDP, whose hook runs next, that the gradient is in `main_grad`. The hook wants a `grad` all the
    same: this one is zero and takes no memory, so that whoever adds it adds nothing."""
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if parameter.grad is None:
        parameter.grad = _zero(parameter.dtype, parameter.device).expand(parameter.shape)


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros((), dtype=dtype, device=device)


class _WeightedSwiglu(torch.autograd.Function):
    """h [P, 2 * F], probs [P] -> [P, F]."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, probs: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
        probs = probs.contiguous()
        ctx.save_for_backward(h, probs, used)
        return _kernels(h).forward(h, probs, used)  # type: ignore[no-any-return]

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        h, probs, used = ctx.saved_tensors
        grad_h, grad_probs = _kernels(h).backward(grad.contiguous(), h, probs, used)
        return (
            grad_h,  # h
            grad_probs,  # probs
            None,  # used
        )


def _kernels(rows: torch.Tensor) -> Any:
    """The module with `forward`, `backward` and `zero_tail_` for this device."""
    return kernels_for(rows, swiglu, "experts")
