"""A SwiGLU MLP of several experts on rows sorted by expert, with gradients.

    h = x @ w1.T [P, 2 * F]  ->  a = silu(gate) * up * prob [P, F]  ->  y = a @ w2.T [P, H]

Four kernels forward (two GEMMs, one activation, one that zeroes unowned rows), or three if the host knows that there
are no unowned rows. Their contents reach neither a weight's gradient nor another row: GEMMs skip them, and kernels that
write them write zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol, TypeAlias, TypeVar

import torch

from megatron_ep_v2.errors import InputError
from megatron_ep_v2.experts.gemm import Gemm, gemm
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.gradients import Context, InputGrads, first_order, order
from megatron_ep_v2.kernels import swiglu, wgrad
from megatron_ep_v2.kernels.select import kernels_for
from megatron_ep_v2.layouts.places import place_contiguous, rows_that_fit
from megatron_ep_v2.layouts.rows import gather_with_weights, reduce_rows

Rows = TypeVar("Rows", contravariant=True)


class Linear(Protocol[Rows]):
    """Interface of a linear layer of several experts: `Weights`, or a module that owns its weights.

    Rows: What it takes for `groups`: `Groups`, or `redundant.ReplicaRows`.
    """

    @property
    def weight(self) -> torch.Tensor:
        """[L, N, K]."""

    def __call__(
        self,
        x: torch.Tensor,
        groups: Rows,
        multiply: Gemm,
        last: bool,
        activation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Weights:
    """Linear layer with a plain tensor [L, N, K] as its weight."""

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
    """Run SwiGLU experts on rows sorted by expert.

    Args:
        x: [P, H].
        probs: [P], of a floating dtype: a factor for each row.
        w1: [L, 2 * F, H]: the gate's rows first, then up's.
        w2: [L, H, F].
        groups: Of the rows.
        backend: `deepgemm`, `grouped` or `sequential`. If it needs padded experts and the rows are not padded, they are
            copied there and back.

    Returns:
        [P, H]; unowned rows are zero.

    Raises:
        EPError: The backend cannot run here, or not with these dtypes and sizes.
    """
    return run_experts(x, probs, Weights(w1), Weights(w2), groups, backend)


def run_experts(
    x: torch.Tensor,
    probs: torch.Tensor,
    fc1: Linear[Groups],
    fc2: Linear[Groups],
    groups: Groups,
    backend: str,
    recompute_activation: bool = False,
) -> torch.Tensor:
    """`swiglu_experts` with linear layers that own their weights.

    A module that owns a parameter must be called to use it: Megatron's DDP gathers the parameter in a hook before the
    module's forward (`--overlap-param-gather`).

    Args:
        recompute_activation: Compute the activation again in backward instead of saving its P * F elements.
    """
    w1, w2 = fc1.weight, fc2.weight
    of_rows, of_w2, experts = x.shape, w2.shape, groups.ends.shape[0]
    fits = len(of_rows) == 2 and probs.shape == of_rows[:1] and of_w2 == (experts, of_rows[1], of_w2[2])
    if not fits or w1.shape != (experts, 2 * of_w2[2], of_rows[1]):
        raise InputError(
            "these are not the rows and weights of SwiGLU experts",
            found=f"rows {tuple(of_rows)}, probs {tuple(probs.shape)}, weights {tuple(w1.shape)} and "
            f"{tuple(of_w2)}, {experts} groups",
            needed="[P, H], [P], [L, 2 * F, H], [L, H, F], L",
            fix="pass the rows and probabilities of one dispatch, its groups, and this rank's own experts",
        )
    chosen = gemm(backend)
    chosen.check(x, w1)
    chosen.check(x, w2)
    if groups.alignment % chosen.alignment:
        return _padded(x, probs, fc1, fc2, groups, backend, chosen.alignment, recompute_activation)
    h = fc1(x, groups, chosen, False)
    activated = WeightedSwiglu.apply(h, probs, groups.used)
    return fc2(activated, groups, chosen, True, (h, probs) if recompute_activation else None)


def _padded(
    x: torch.Tensor,
    probs: torch.Tensor,
    fc1: Linear[Groups],
    fc2: Linear[Groups],
    groups: Groups,
    backend: str,
    alignment: int,
    recompute_activation: bool,
) -> torch.Tensor:
    """`run_experts` on a copy of the rows in which each expert is padded to a multiple of `alignment`."""
    slot = torch.arange(len(x), dtype=torch.int32, device=x.device)
    expert = torch.searchsorted(groups.ends, slot, right=True)[:, None]  # L = unowned
    if groups.sizes is None:
        num_rows = rows_that_fit(len(x), len(groups.ends), alignment)
    else:
        num_rows = sum(-(-size // alignment) * alignment for size in groups.sizes)
    places = place_contiguous(expert, None, len(groups.ends), num_rows, alignment)
    rows, row_probs = gather_with_weights(x, probs[:, None], places)
    padded = replace(Groups.from_places(places), rows_node=groups.rows_node)
    y = run_experts(rows, row_probs, fc1, fc2, padded, backend, recompute_activation)
    return reduce_rows(y, places)


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    groups: Groups,
    multiply: Gemm,
    last: bool,
    activation: tuple[torch.Tensor, torch.Tensor] | None = None,
    main_grad: torch.Tensor | None = None,
    delayed: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Multiply each row by its own expert's weights.

    Args:
        x: [P, K].
        w: [L, N, K].
        groups: Of the rows.
        multiply: The backend.
        last: Whether this is the second linear: it zeroes unowned rows of its output.
        activation: h [P, 2 * K] and probs [P], from which backward computes `x` again; None = save `x`.
        main_grad: [L, N, K], fp32 or w's dtype. Backward adds the gradient of `w` to it, accumulated in fp32, and
            autograd gets zero (`mark_added`), as with Megatron's `gradient_accumulation_fusion`. Where `w` has the
            attribute `overwrite_main_grad` (TransformerEngine's and Megatron-FSDP's name), true when the gradient is
            computed, it replaces what is there. None = the gradient goes to autograd.
        delayed: Backward does not compute the gradient of `w`, but appends a token [0] here, whose own backward
            (`run_delayed`) does. None = it computes it, at once or as `groups.rows_node` says.

    Returns:
        [P, N].
    """
    fused, later, token = None if main_grad is None else (w, main_grad), None, None
    if (groups.rows_node is not None or delayed is not None) and w.requires_grad and torch.is_grad_enabled():
        later, w = _Later(w, groups.rows_node, delayed), w.detach()
        token = later.token
    return _Linear.apply(x, w, groups, multiply, last, fused, later, token, *(activation or ()))


def run_delayed(delayed: list[torch.Tensor]) -> None:
    """Compute the weight gradients that backwards have left to do, and empty the list. Hooks on them run now. After an
    error the list is as it was: some of the gradients are missing."""
    if delayed:
        torch.autograd.backward(delayed, [torch.empty_like(token) for token in delayed])
        delayed.clear()


class _Later:
    """The gradient of a weight that is computed after the linear's backward has run, by a node of its own.

    Args:
        w: The weight.
        rows_node, delayed: See `Groups` and `linear`; `delayed` wins.

    Attributes:
        token: [0], an input of the linear. Its backward is the node, or nothing if the gradient is delayed.
    """

    def __init__(self, w: torch.Tensor, rows_node: int | None, delayed: list[torch.Tensor] | None):
        self._of_node, self._delayed = _WeightGrad.apply(w), delayed
        self.token: torch.Tensor = self._of_node
        if delayed is not None:
            self.token = self._of_node.detach().requires_grad_()
        else:
            assert rows_node is not None
            order(self.token, rows_node - 1)

    def leave(self, compute: Callable[[], torch.Tensor]) -> None:
        """Leave the gradient to the node: `compute` returns it, [L, N, K]."""
        node: _WeightGradContext = self._of_node.grad_fn
        if node.compute is not None:
            raise InputError(
                "a second backward of one forward, and the first one's weight gradients are not computed yet",
                needed="one backward, or the weight gradients in between",
                fix="call backward_dw() after each backward, or run the experts without delay_wgrad_compute",
            )
        node.compute = compute
        if self._delayed is not None:
            self._delayed.append(self._of_node)


class _WeightGradContext(Context, Protocol):
    compute: Callable[[], torch.Tensor] | None  # None = left by no backward, or done


class _WeightGrad(torch.autograd.Function):
    """A weight's gradient as a node of its own, before the weight's: hooks on the gradient run after it. The token has
    no elements: it only connects the node with that of the linear."""

    @staticmethod
    def forward(ctx: _WeightGradContext, w: torch.Tensor) -> torch.Tensor:
        ctx.compute = None
        return w.new_empty(0)

    @staticmethod
    @first_order(linear=True)
    def backward(ctx: _WeightGradContext, _token: torch.Tensor) -> InputGrads:
        compute, ctx.compute = ctx.compute, None
        assert compute is not None  # of the linear's backward
        return (compute(),)  # w


_Fused: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # the parameter and its main_grad


class _LinearContext(Context, Protocol):
    groups: Groups
    gemm: Gemm
    last: bool
    fused: _Fused | None
    later: _Later | None


class _Linear(torch.autograd.Function):
    """Zeroes unowned rows where they leave the MLP: in the output of the last linear, and in the gradient of x of the
    first. Between the two, the activation zeroes them."""

    @staticmethod
    def forward(
        ctx: _LinearContext,
        x: torch.Tensor,
        w: torch.Tensor,
        groups: Groups,
        multiply: Gemm,
        last: bool,
        fused: _Fused | None,
        later: _Later | None,
        token: torch.Tensor | None,
        *activation: torch.Tensor,
    ) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(w, groups.ends, *(activation or (x,)))
        ctx.groups, ctx.gemm, ctx.last, ctx.later = groups, multiply, last, later
        ctx.fused = fused  # with the parameter: saved-tensor hooks (offload) may return a copy without its attributes
        y = multiply.forward(x, w, groups)
        return _kernels(y).zero_tail_(y, groups.used) if last else y

    @staticmethod
    @first_order()
    def backward(ctx: _LinearContext, grad: torch.Tensor) -> InputGrads:
        w, ends, *kept = ctx.saved_tensors
        groups = ctx.groups.of_run(ends)
        grad, grad_x, grad_w = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.gemm.dgrad(grad, w, groups)
            if not ctx.last:
                grad_x = _kernels(grad_x).zero_tail_(grad_x, groups.used)
        grad_token = None
        if ctx.needs_input_grad[1] or ctx.later is not None:
            compute = functools.partial(_weight_grad, grad, kept, groups, ctx.gemm, ctx.fused)
            if ctx.later is None:
                grad_w = compute()
            else:
                ctx.later.leave(compute)
                grad_token = grad.new_empty(0)
        return (
            grad_x,  # x
            grad_w,  # w: None if it comes later
            *[None] * 5,  # groups, gemm, last, fused, later
            grad_token,  # token
            *[None] * (len(kept) if len(kept) > 1 else 0),  # activation: its gradient flows through x
        )


def _weight_grad(
    grad: torch.Tensor, kept: list[torch.Tensor], groups: Groups, multiply: Gemm, fused: _Fused | None
) -> torch.Tensor:
    """The gradient of a weight for autograd, [L, N, K]: zero if it was added to `main_grad`. kept: See
    `_Linear.forward`."""
    x = kept[0] if len(kept) == 1 else _kernels(grad).forward(*kept, groups.used)
    if fused is None:
        return multiply.wgrad(grad, x, groups)
    parameter, main_grad = fused
    wgrad.add_(main_grad, grad, x, groups.ends, overwrites(parameter))
    return mark_added(parameter)


def overwrites(parameter: torch.Tensor) -> bool:
    """Whether a gradient replaces what is in `main_grad`. Not asked for in the forward: of several micro-batches that
    are in flight, only the first backward's may."""
    return bool(getattr(parameter, "overwrite_main_grad", False))


def mark_added(parameter: torch.Tensor) -> torch.Tensor:
    """Mark for Megatron's DDP, whose hook runs next, that the gradient is in `main_grad`. Returns what autograd gets
    for it: a zero of the parameter's shape, sparse, so that it takes no memory and adding it changes nothing.

    Not None: the hook, which may start the reduction of `main_grad`, runs in the stream in which DDP was built, for
    Megatron-LM one of its own, and autograd makes that wait for the gradient's stream only if there is a gradient.
    """
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device, layout=torch.sparse_coo)


class WeightedSwiglu(torch.autograd.Function):
    """h [P, 2 * F], probs [P] -> [P, F]."""

    @staticmethod
    def forward(ctx: Context, h: torch.Tensor, probs: torch.Tensor, used: torch.Tensor | None) -> torch.Tensor:
        probs = probs.contiguous()
        ctx.save_for_backward(h, probs, used)
        return _kernels(h).forward(h, probs, used)

    @staticmethod
    @first_order()
    def backward(ctx: Context, grad: torch.Tensor) -> InputGrads:
        h, probs, used = ctx.saved_tensors
        grad_h, grad_probs = _kernels(h).backward(grad.contiguous(), h, probs, used)
        return (
            grad_h,  # h
            grad_probs,  # probs
            None,  # used
        )


def _kernels(rows: torch.Tensor) -> ModuleType:
    """The module with `forward`, `backward` and `zero_tail_` for this device."""
    return kernels_for(rows, swiglu, "experts")
