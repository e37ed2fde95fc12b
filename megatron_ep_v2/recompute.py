"""Activation recompute without a second layout: the replayed dispatch takes the handle of the first one.

A checkpoint runs a function twice: first without keeping what is inside, and once more in the backward, to have it. The
second run dispatches the same tokens to the same experts, so the first run's handle fits: no counts are exchanged, and
the host waits for nothing. The handle rides with the checkpoint itself. `Replayed` takes the place of the function that
the checkpoint keeps for its second run; it notes the handles made inside in the first run and hands them out, in order,
in the second. So micro-batches in flight cannot be mixed up, and handles are freed with the checkpoint: at once where
nothing will be recomputed (no_grad), and with the autograd graph where a step is given up.

`install()` binds `wrapped` around the two checkpoints that Megatron uses: its own CheckpointFunction, and
TransformerEngine's. For torch's, pass `Replayed(function)` yourself.

The second run uses the selections of the first and its own probabilities for them; `routing_guard` sees to that.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch


class _Runs(threading.local):
    """The checkpointed functions that run on this thread now, the innermost last: (function, whether it runs again).
    Autograd recomputes on a thread of its own."""

    def __init__(self) -> None:
        self.stack: list[tuple[Replayed, bool]] = []


_runs = _Runs()


class Replayed:
    """A function for one checkpoint: what it dispatches in its first run is replayed in its second. Make a new one for
    each checkpointed call.

    Torch's checkpoint without reentry may run it again for each backward that comes by, and each run begins with the
    first handle: the graph of the first run is the one that is used. A handle that was taken is kept for that only as
    long as somebody else keeps it, which is until its own backward.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self._handles: list[Callable[[], Any]] = []  # of the first run, in order; each returns None once it is gone
        self._taken = 0  # by the run that goes on
        self._has_run = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        again, self._has_run = self._has_run, True
        self._taken = 0
        _runs.stack.append((self, again))
        try:
            return self.function(*args, **kwargs)
        finally:
            _runs.stack.pop()

    def note(self, handle: Any) -> None:
        """Keep a handle of the first run."""
        self._handles.append(lambda: handle)

    def take(self) -> Any:
        """The next handle; None if there is none, or no more."""
        if self._taken == len(self._handles):
            return None
        handle = self._handles[self._taken]()
        if handle is not None:
            self._handles[self._taken] = weakref.ref(handle)
        self._taken += 1
        return handle


def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint's forward, which runs a function and keeps it: `forward(ctx, run_function, ...)`, on `Replayed`."""

    @functools.wraps(forward)
    def forward_replayed(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, Replayed(run_function), *args)

    return forward_replayed


def runs_again() -> bool:
    """Whether a checkpoint recomputes now, on this thread."""
    return any(again for _, again in _runs.stack)


def take() -> Any:
    """The handle of the dispatch that is being replayed; None where nothing is recomputed, or nothing was noted.

    Of checkpoints inside each other, the innermost that runs again has it. One inside that which runs for the first
    time (as it does again whenever the outer one recomputes) notes it for its own second run: see `note`.
    """
    if not _runs.stack:
        return None
    for run, again in reversed(_runs.stack):
        if again:
            return run.take()
    return None


def runs_first() -> bool:
    """Whether a checkpoint runs its function for the first time now, on this thread, to run it again in backward."""
    return any(not again for _, again in _runs.stack)


def note(buffer: Any, handle: Any, topk_weights: torch.Tensor) -> None:
    """Keep a handle for the second run of each checkpoint that is in its first run now.

    Args:
        buffer: Of the handle; one that cannot repeat a dispatch with weights keeps none.
        handle: Of the dispatch.
        topk_weights: [T, K], its probabilities; kept with the handle.
    """
    if not _runs.stack or not buffer.supports_cached_weights:
        return
    for run, again in reversed(_runs.stack):
        if again:
            return
        vars(handle)["topk_weights"] = topk_weights.detach()
        run.note(handle)
