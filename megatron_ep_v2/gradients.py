"""What the backwards of this package share: whole gradients, the handle that fits the activations, first order only.

Torch's checkpoint without reentry runs a forward a second time and gives its backward the activations of that run. A
dispatch may order its rows anew each time, so the backward must take the handle of the same run. Torch hands over only
saved tensors. So a handle is saved as one: its mark, an integer on the CPU. What the hooks give back is the mark of the
run whose activations they give back, whoever set them up.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from megatron_ep_v2.errors import EPError

Routings: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_numbers = itertools.count()
# By number: the mark's memory, and what `take_handle` returns, which lives as long as that or until it is taken.
_marked: dict[int, tuple[weakref.ref[Any], tuple[Any, Routings | None]]] = {}


def whole_gradient(
    grad: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An output's gradient, contiguous; zeros where autograd has none: the backward is a collective, in which a rank
    that used nothing of the output takes part.

    Args:
        grad: In the output's dtype, to which autograd brings it; None = the output was not used.
        shape, dtype, device: The output's.
    """
    if grad is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return grad.contiguous()


def save_handle(ctx: Any, handle: Any, routings: Routings | None) -> None:
    """In a dispatch's forward: keep the handle for its backward, and for the combine's. It saves one tensor.

    Args:
        handle: Of the dispatch.
        routings: [T, K] each, what a recomputed dispatch repeated and what it selected itself; None = it repeated none.
    """
    vars(handle)["dispatch"] = weakref.ref(ctx)
    _save_mark(ctx, handle, routings)


def share_handle(ctx: Any, handle: Any) -> None:
    """In a combine's forward: keep the handle that its dispatch has kept. Where autograd did not record the dispatch,
    as none of its inputs had a gradient, the combine keeps its own. (Not always: what a checkpoint saves last, it also
    recomputes, and a combine is a collective.)"""
    dispatch = getattr(handle, "dispatch", None)
    ctx.dispatch, ctx.taken = dispatch and dispatch(), False
    if ctx.dispatch is None:
        _save_mark(ctx, handle, None)


def take_handle(ctx: Any) -> tuple[Any, Routings | None]:
    """In a backward: handle and `routings` of the run whose activations it gets. Given up with that: they must not live
    on in a loss that the user keeps.

    Raises:
        EPError: They were taken before, or a hook has lost them.
    """
    holder = getattr(ctx, "dispatch", None) or ctx
    if ctx.taken or holder.kept is None:
        raise EPError(
            "backward ran a second time through one dispatch or combine",
            needed="one backward per forward; the handle is released with the first",
            fix="run the forward again instead of backward(retain_graph=True)",
        )
    if not holder.settled:
        _settle(holder)
    kept: tuple[Any, Routings | None] = holder.kept
    ctx.taken = True
    if holder is ctx:
        ctx.kept = None
    else:
        ctx.dispatch = None
    return kept


def _save_mark(ctx: Any, handle: Any, routings: Routings | None) -> None:
    number = next(_numbers)
    mark = torch.tensor(number, device="cpu")
    memory = mark.untyped_storage()  # one object as long as any tensor has it: a checkpoint may save a detached one
    ctx.kept = handle, routings
    _marked[number] = weakref.ref(memory, lambda _: _marked.pop(number, None)), ctx.kept
    ctx.save_for_backward(mark)
    ctx.number, ctx.settled, ctx.taken = number, False, False


def _settle(holder: Any) -> None:
    """Once, because a checkpoint unpacks a saved tensor once."""
    mark = holder.saved_tensors[0]  # held here: without it the handle would go
    number = int(mark)
    if number != holder.number:
        if number not in _marked:
            raise EPError(
                "a dispatch was run again for its backward, but the handle of that run is gone",
                found="a saved tensor that some hook kept by value and not by reference",
                fix="wrap the function: checkpoint(megatron_ep_v2.recompute.Replayed(function), ..., "
                "use_reentrant=False)",
            )
        holder.kept = _marked.pop(number)[1]
    _marked.pop(holder.number, None)
    holder.settled = True


def first_order(backward: Callable[..., Any] | None = None, *, linear: bool = False) -> Callable[..., Any]:
    """A backward whose own gradient is refused with an error, where torch would take it for a constant.

    Unlike `once_differentiable`, the error comes wherever a gradient would have to flow: the result stays connected to
    all that it depends on.

    Args:
        backward: Of a `torch.autograd.Function`.
        linear: It depends on the outputs' gradients alone, and not on saved tensors. Where none of them has a gradient
            itself, neither has the result, and nothing is refused.
    """
    if backward is None:
        return functools.partial(first_order, linear=linear)

    @functools.wraps(backward)
    def refusing(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():  # no create_graph
            return backward(ctx, *grads)
        ctx = ctx if linear else _Unpacked(ctx)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        sources = [each for each in (*grads, *(() if linear else ctx.saved_tensors)) if each is not None]
        sources = [each for each in sources if each.requires_grad]
        if not sources:
            return outputs
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(_Refused.apply(out, *sources) if isinstance(out, torch.Tensor) else out for out in outputs)

    return refusing


class _Unpacked:
    """A context whose saved tensors are unpacked once, as a checkpoint asks for. Everything else is the context's."""

    def __init__(self, ctx: Any):
        vars(self).update(_ctx=ctx, saved_tensors=ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


class _Refused(torch.autograd.Function):
    """A first-order gradient as it is, and what it was computed from."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise EPError(
            "the gradient of a gradient was asked for, through a dispatch, a combine or experts of this package",
            found="a backward through what create_graph=True recorded (gradient penalty, Hessian-vector product)",
            needed="first-order gradients: the backwards are communication and kernels that are not differentiated",
            fix="use --moe-token-dispatcher-type alltoall and Megatron's own experts for such a loss",
        )
