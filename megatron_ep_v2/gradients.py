"""Shared parts of this package's backwards: whole gradients, the handle that fits the activations, first order only.

Torch's checkpoint without reentry runs a forward a second time and gives its backward the activations of that run. The
row order may differ between runs, so the backward must use the handle of the same run. Torch passes only saved tensors.
So a handle is saved as a tensor: its mark, an integer on the CPU. Saved-tensor hooks then return the mark of the run
whose activations they return.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import NoReturn, Protocol, TypeAlias

import torch

from megatron_ep_v2.buffers.contract import Handle
from megatron_ep_v2.errors import EPError

Routings: TypeAlias = tuple[torch.Tensor, torch.Tensor]
Kept: TypeAlias = tuple[Handle, Routings | None]  # what `take_handle` returns
InputGrads: TypeAlias = tuple[torch.Tensor | None, ...]  # of a forward's inputs; None for an input without one
Backward: TypeAlias = Callable[..., InputGrads]


class Context(Protocol):
    """Autograd's `ctx` in forwards and backwards: torch's FunctionCtx has only what a forward calls. A function that
    keeps attributes of its own extends it.

    Attributes:
        saved_tensors: In a backward: as saved; None where None was saved.
        needs_input_grad: In a backward, for each input of the forward.
    """

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...
    def mark_non_differentiable(self, *outputs: torch.Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


class HandleContext(Context, Protocol):
    """Context of a dispatch, or of a combine, which keeps a handle only if its dispatch does not.

    Attributes:
        dispatch: In a combine: the context that keeps the handle; None = this one.
        kept: The handle of the forward, or of the run that `settled` has found; None = taken.
        number: Of the mark that was saved.
        settled: Whether `kept` belongs to the run whose activations the backward gets.
        taken: Whether this context's backward has taken it.
    """

    dispatch: HandleContext | None
    kept: Kept | None
    number: int
    settled: bool
    taken: bool


_numbers = itertools.count()
# By number: the mark's storage, and what it marks. An entry lives as long as the storage, or until taken.
_marked: dict[int, tuple[weakref.ref[torch.UntypedStorage], Kept]] = {}


def whole_gradient(
    grad: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An output's gradient, contiguous; zeros if autograd has none, because the backward is a collective in which a
    rank that did not use the output must take part.

    Args:
        grad: In the output's dtype (autograd casts it); None = the output was not used.
        shape, dtype, device: The output's.
    """
    if grad is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return grad.contiguous()


def order(tensor: torch.Tensor, number: int) -> None:
    """Set when the backward of the node that made a tensor runs: of the nodes that can run, autograd takes the one with
    the highest number. A tensor without a node is left as it is."""
    if tensor.grad_fn is not None:
        tensor.grad_fn._set_sequence_nr(number)  # type: ignore[attr-defined]


def save_handle(ctx: HandleContext, handle: Handle, routings: Routings | None) -> None:
    """In a dispatch's forward: keep the handle for its backward and for the combine's. Saves one tensor.

    Args:
        handle: Of the dispatch.
        routings: [T, K] each, the routing that a recomputed dispatch repeated, and the one that its router selected;
            None = not recomputed.
    """
    vars(handle)["dispatch"] = weakref.ref(ctx)
    _save_mark(ctx, handle, routings)


def share_handle(ctx: HandleContext, handle: Handle) -> None:
    """In a combine's forward: use the handle that its dispatch keeps. If autograd did not record the dispatch, because
    no input needed a gradient, the combine saves its own. (Only then: a checkpoint recomputes up to the last tensor
    saved, and a combine is a collective.)"""
    dispatch = getattr(handle, "dispatch", None)
    ctx.dispatch, ctx.taken = dispatch and dispatch(), False
    if ctx.dispatch is None:
        _save_mark(ctx, handle, None)


def take_handle(ctx: HandleContext) -> Kept:
    """In a backward: take handle and `routings` of the run whose activations it gets. The context drops them, so that a
    loss that the user keeps does not keep them alive.

    Raises:
        EPError: They were taken before, or a hook has lost them.
    """
    holder: HandleContext = getattr(ctx, "dispatch", None) or ctx
    if ctx.taken or holder.kept is None:
        raise EPError(
            "backward ran a second time through one dispatch or combine",
            needed="one backward per forward; the handle is released with the first",
            fix="run the forward again instead of backward(retain_graph=True)",
        )
    if not holder.settled:
        _settle(holder)
    kept = holder.kept
    ctx.taken = True
    if holder is ctx:
        ctx.kept = None
    else:
        ctx.dispatch = None
    return kept


def _save_mark(ctx: HandleContext, handle: Handle, routings: Routings | None) -> None:
    number = next(_numbers)
    mark = torch.scalar_tensor(number, dtype=torch.int64, device="cpu")
    memory = mark.untyped_storage()  # shared by detached copies, which a checkpoint may save
    ctx.kept = handle, routings
    _marked[number] = weakref.ref(memory, lambda _: _marked.pop(number, None)), ctx.kept
    ctx.save_for_backward(mark)
    ctx.number, ctx.settled, ctx.taken = number, False, False


def _settle(holder: HandleContext) -> None:
    """Find the handle of the run. Called once, because a checkpoint unpacks a saved tensor only once."""
    mark = holder.saved_tensors[0]  # a reference, which keeps the entry in _marked
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


def first_order(*, linear: bool = False) -> Callable[[Backward], Backward]:
    """Wrap the backward of a `torch.autograd.Function` to raise when its own gradient is asked for, where torch would
    treat it as a constant.

    Unlike with `once_differentiable`, the error comes wherever a gradient would have to flow: the result stays
    connected to all that it depends on.

    Args:
        linear: The backward depends only on the outputs' gradients, not on saved tensors. If none of these requires a
            gradient, neither does the result, and nothing raises.
    """

    def wrap(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def refusing(ctx: Context, *grads: torch.Tensor | None) -> InputGrads:
            if not torch.is_grad_enabled():  # no create_graph
                return backward(ctx, *grads)
            used: Context | _Unpacked = ctx if linear else _Unpacked(ctx)
            with torch.no_grad():
                outputs = backward(used, *grads)
            sources = [each for each in (*grads, *(() if linear else used.saved_tensors)) if each is not None]
            sources = [each for each in sources if each.requires_grad]
            if not sources:
                return outputs
            return tuple(None if out is None else _Refused.apply(out, *sources) for out in outputs)

        return refusing

    return wrap


class _Unpacked:
    """A context whose saved tensors are unpacked once, as a checkpoint requires; other attributes are the context's."""

    _ctx: Context
    saved_tensors: tuple[torch.Tensor, ...]

    def __init__(self, ctx: Context):
        vars(self).update(_ctx=ctx, saved_tensors=ctx.saved_tensors)

    def __getattr__(self, name: str) -> object:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._ctx, name, value)


class _Refused(torch.autograd.Function):
    """Identity on a first-order gradient, connected to the tensors it was computed from; its backward raises."""

    @staticmethod
    def forward(ctx: Context, grad: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return grad.detach()  # a sparse one has no other view

    @staticmethod
    def backward(ctx: Context, *_: torch.Tensor | None) -> NoReturn:
        raise EPError(
            "the gradient of a gradient was asked for, through a dispatch, a combine or experts of this package",
            found="a backward through what create_graph=True recorded (gradient penalty, Hessian-vector product)",
            needed="first-order gradients: the backwards are communication and kernels that are not differentiated",
            fix="use --moe-token-dispatcher-type alltoall and Megatron's own experts for such a loss",
        )
