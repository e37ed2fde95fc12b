"""Activation recompute without a second layout: the replayed dispatch takes the handle of the first one.

A checkpoint runs a function twice: first without saving activations, and again in the backward, to get them. The second
run dispatches the same tokens to the same experts, so the first run's handle fits: no counts are exchanged, and the
host does not wait. The checkpoint itself keeps the handle: `Replayed` wraps the function that the checkpoint keeps for
its second run, records the handles made in the first run, and returns them in order in the second. So micro-batches in
flight cannot be mixed up, and handles are freed with the checkpoint: at once if nothing will be recomputed (no_grad),
    and with
the autograd graph if a step is abandoned.

`install()` binds `wrapped` around the two checkpoints that Megatron uses: its own CheckpointFunction, and
TransformerEngine's. For torch's, pass `Replayed(function)` yourself.

The second run uses the selections of the first, with its own probabilities. A forward that does not repeat bit by bit
(atomic adds, several layers in one checkpoint) may swap two experts of nearly equal probability. Such near ties are
counted, and a warning gives their number; the missing expert gets the probability of the one selected instead. More
changes than that are a changed routing: every rank raises before the optimizer's step (see `device_checks`).
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.contract import Buffer, Handle
from megatron_ep_v2.device_checks import DeviceCheck
from megatron_ep_v2.errors import RoutingChangedError
from megatron_ep_v2.kernels import replay
from megatron_ep_v2.kernels.select import triton_if_installed

logger = logging.getLogger("megatron_ep_v2")

R = TypeVar("R")


class _Runs(threading.local):
    """Checkpointed functions running on this thread, the innermost last: (function, whether it runs again).
    Thread-local, because autograd recomputes on its own threads."""

    def __init__(self) -> None:
        self.stack: list[tuple[Replayed, bool]] = []


_runs = _Runs()


class Replayed:
    """A function for one checkpoint, whose second run replays the dispatches of its first. Make a new one for each
    checkpointed call.

    Torch's checkpoint without reentry may run it again for each backward. Each run begins with the first handle,
    because autograd uses the graph of the first run. A handle that was taken is only weakly referenced from then on: it
    lives until its own backward.
    """

    def __init__(self, function: Callable[..., object]):
        self.function = function
        # Of the first run, in order; each returns None once it is freed.
        self._handles: list[Callable[[], Handle | None]] = []
        self._taken = 0  # by the current run
        self._has_run = False

    def __call__(self, *args: object, **kwargs: object) -> object:
        again, self._has_run = self._has_run, True
        self._taken = 0
        _runs.stack.append((self, again))
        try:
            return self.function(*args, **kwargs)
        finally:
            _runs.stack.pop()

    def note(self, handle: Handle) -> None:
        """Keep a handle of the first run."""
        self._handles.append(lambda: handle)

    def coming(self) -> Handle | None:
        """What `take` will return."""
        return None if self._taken == len(self._handles) else self._handles[self._taken]()

    def take(self) -> Handle | None:
        """Return the next handle; None if there is none or it was freed."""
        if self._taken == len(self._handles):
            return None
        handle = self._handles[self._taken]()
        if handle is not None:
            self._handles[self._taken] = weakref.ref(handle)
        self._taken += 1
        return handle


def wrapped(forward: Callable[..., R]) -> Callable[..., R]:
    """Wrap a checkpoint's `forward(ctx, run_function, ...)` to run and keep `Replayed(run_function)`."""

    @functools.wraps(forward)
    def forward_replayed(ctx: FunctionCtx, run_function: Callable[..., object], *args: object) -> R:
        return forward(ctx, Replayed(run_function), *args)

    return forward_replayed


def runs_again() -> bool:
    """Whether a checkpoint is recomputing on this thread."""
    return any(again for _, again in _runs.stack)


def in_checkpoint() -> bool:
    """Whether a checkpoint that keeps handles runs its function on this thread, for the first time or again."""
    return bool(_runs.stack)


def take() -> Handle | None:
    """Take the handle of the dispatch that is being replayed; None if nothing is recomputed, or nothing was recorded.

    Among nested checkpoints, the innermost that runs again has it. A checkpoint inside that one, which runs its
    function for the first time (whenever the outer one recomputes), records the handle for its own second run: see
    `note`.
    """
    if not _runs.stack:
        return None
    for run, again in reversed(_runs.stack):
        if again:
            return run.take()
    return None


def coming() -> Handle | None:
    """What `take` will return, for code that runs before the dispatch."""
    again = next((run for run, again in reversed(_runs.stack) if again), None)
    return again.coming() if again is not None else None


def runs_first() -> bool:
    """Whether a checkpoint on this thread is in its first run, which the backward will repeat."""
    return any(not again for _, again in _runs.stack)


def note(buffer: Buffer, handle: Handle, topk_weights: torch.Tensor) -> None:
    """Record a handle for the second run of each checkpoint that is in its first run.

    Args:
        buffer: Of the handle; nothing is recorded if it cannot repeat a dispatch with weights.
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


# -------------------------------------------------------------------------------------------- routing of the second run

# A changed selection is a near tie if the probabilities of the two experts differ by less than this fraction of the
# first one's: rounding to bf16, 2**-9 of a value, moves a logit of size 10 by 0.02, and its probability by 2 %.
NEAR = 1 / 16
# The routing has changed if more than this fraction of a dispatch's selections differ: in total, and by more than a
# near tie. (Routers with a bias or with expert groups select by other numbers than the probabilities.)
MOST_CHANGED, MOST_FAR = 1 / 4, 1 / 64

# By buffer: counts of selections of changed routings, and of near ties.
_checks: weakref.WeakKeyDictionary[Buffer, tuple[DeviceCheck, DeviceCheck]] = weakref.WeakKeyDictionary()


def as_first(first: Handle, topk_idx: torch.Tensor, topk_weights: torch.Tensor, buffer: Buffer) -> torch.Tensor:
    """In a second run: return its own probabilities for the selections of the first. Counts changed selections on the
    device, without a host wait.

    Args:
        first: The handle of the first run's dispatch, with its `topk_weights` (see `recompute.note`).
        topk_idx: [T, K] int64, this run's selections, in any order.
        topk_weights: [T, K], its probabilities.
        buffer: Of the handle.

    Returns:
        [T, K], in the first run's columns. An expert that this run does not select gets the mean probability of those
        that it selects instead.

    Raises:
        RoutingChangedError: On every rank of the group, before the optimizer's step.
    """
    wanted = first.topk_idx
    if topk_idx.shape != wanted.shape:
        return topk_weights  # the buffer raises
    if buffer not in _checks:
        device = topk_idx.device
        _checks[buffer] = (
            DeviceCheck(_routing_changed, device, buffer.group),
            DeviceCheck(_near_ties(buffer.group), device, buffer.group),
        )
    another, ties = _checks[buffer]
    number = topk_idx.numel()
    weights: torch.Tensor = _kernels(topk_weights).follow(
        *(wanted, vars(first)["topk_weights"], topk_idx, topk_weights),
        *(NEAR, int(MOST_FAR * number), int(MOST_CHANGED * number), another.count, ties.count),
    )
    another.touch()
    ties.touch()
    return weights


def grad_of_own(wanted: torch.Tensor, topk_idx: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradient of `topk_weights` in `as_first`: [T, K].

    Args:
        wanted: [T, K], the first run's selections.
        topk_idx: [T, K], this run's.
        grad: [T, K], gradient of the result of `as_first`.
    """
    own: torch.Tensor = _kernels(grad).back(wanted, topk_idx, grad.contiguous())
    return own


def _kernels(weights: torch.Tensor) -> ModuleType:
    """The Triton module for fp32 on CUDA devices; else PyTorch's."""
    if not weights.is_cuda or weights.dtype != torch.float32:
        return replay
    return triton_if_installed(replay.__name__, "PyTorch compares recomputed routings") or replay


def _near_ties(group: ProcessGroup | None) -> Callable[[dict[int, int]], None]:
    """A function that warns at a buffer's first near ties, and at each tenfold increase, on the group's first rank."""
    total, next_warning = 0, 1

    def warn(selections: dict[int, int]) -> None:
        nonlocal total, next_warning
        total += sum(selections.values())
        if total >= next_warning:
            next_warning = 10 * total
            if group is None or group.rank() == 0:  # every rank of the group has the same counts
                logger.warning(
                    "recompute: %d selections so far were other experts than in the first forward, as in near ties; "
                    "the first forward's were used. The forward does not repeat bit by bit (atomic adds, several "
                    "layers in one checkpoint). MCORE_DEEPEP_V2_DETERMINISTIC=1 makes this package's part repeat",
                    total,
                )

    return warn


def _routing_changed(selections: dict[int, int]) -> RoutingChangedError:
    return RoutingChangedError(
        f"the recomputed forward chose other experts than the first on rank(s) {sorted(selections)} of the group",
        found=f"selections that differ, by rank: {selections}, too many or too far apart for near ties",
        needed="the same selections, because a recomputed dispatch repeats the routing of the first",
        fix="compare the router's inputs in the two forwards of one checkpoint: a state that has changed, a generator "
        "that the checkpoint does not restore, a layer that does not repeat; or set "
        "MCORE_DEEPEP_V2_REUSE_RECOMPUTE_HANDLE=off, so that each run uses its own routing",
    )
