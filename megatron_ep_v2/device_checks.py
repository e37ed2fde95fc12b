"""Device checks: violations are counted on the device without a host wait and read once before the optimizer's step.

A check that the host reads at once would stop it in every layer. Instead each call adds its violations to an integer
that stays on the device, also inside a captured CUDA graph. Before the next optimizer's step the host reads all of them
in one copy, and raises the error of the check that counted something.

They are read:

- In sync-free mode by Megatron's schedules (`megatron.forward_backward`), which repeat a step that has overflowed.
- Under `install()` by Megatron's optimizers (`megatron.optimizer_step`), before they read a gradient, also if the step
  is replayed from a CUDA graph. All ranks of the model decide together: if one group's check counted something, every
  rank raises, and no rank changes a weight.
- By any other torch optimizer, in a hook before the first parameter changes. Ranks of one expert-parallel group decide
  together; other groups do not learn of it. A job with several groups calls `read_all(group of all its ranks)` before
  it steps.
- By a loop that captures its own optimizer's step into a CUDA graph, in which hooks do not run: it calls `read_all()`
  before each replay, and captures inside `read_by_caller()`, without which the capture is refused.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_ep_v2.buffers.groups import registered
from megatron_ep_v2.errors import (
    EPError,
    EvaluationOverflowError,
    LayoutOverflowError,
    PeerError,
    RoutingChangedError,
)

logger = logging.getLogger("megatron_ep_v2")

_numbers = itertools.count()
# Errors that a rank raises because of another rank's check. The most severe is last: that step must not be repeated.
_ELSEWHERE: tuple[type[EPError], ...] = (
    PeerError,
    LayoutOverflowError,
    EvaluationOverflowError,  # which a repeated training step would not repair
    RoutingChangedError,
)
_live: weakref.WeakValueDictionary[int, DeviceCheck] = weakref.WeakValueDictionary()  # by age, as on the other ranks
os.register_at_fork(after_in_child=_live.clear)  # a forked child that steps an optimizer must not read for its parent


class DeviceCheck:
    """An integer on the device that is 0 unless a violation was counted. Weakly registered: the owner keeps it alive.

    Args:
        to_error: Makes the error from `{rank: count}` of the ranks that counted something; not called if none did.
            Returns None for no error, e.g. if it only logs.
        device: Device of the violations.
        group: Reads are collective over it: one small all-gather gives every rank all counts, and every rank raises the
            same error. Its ranks must create their checks in the same order, add to the same ones between two reads (as
            collective calls do), and read at the same steps. None, or a group destroyed since: each rank reads alone,
            as rank 0.

    Attributes:
        count: [1] int32 on the device. Code that writes it directly (a kernel) must also call `touch()`.
    """

    def __init__(
        self,
        to_error: Callable[[dict[int, int]], EPError | None],
        device: torch.device,
        group: ProcessGroup | None = None,
    ):
        self.to_error, self.group = to_error, group
        with torch.inference_mode(False):  # else an inference tensor, which training cannot write to
            self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self._touched = self._captured = False
        _live[next(_numbers)] = self
        _hook_into_optimizers()

    def add(self, violations: torch.Tensor) -> None:
        """Count violations without a host wait. violations: bool (each True is one) or integers (summed), any shape."""
        self.count += violations.sum(dtype=torch.int32)
        self.touch()

    def touch(self) -> None:
        """Make the next read include `count`. A check that a CUDA graph writes is included in every later read, because
        a replay does not call this."""
        self._touched = True
        self._captured = self._captured or (self.count.is_cuda and torch.cuda.is_current_stream_capturing())

    def read(self) -> None:
        """Wait for the device and raise if something was counted; collective if there is a group."""
        error = _read([self])
        if error is not None:
            raise error

    @property
    def waiting(self) -> bool:
        """Whether a read includes this check."""
        return self._touched or self._captured

    def reset(self) -> None:
        """Set the count to 0."""
        self.count.zero_()
        self._touched = False


def read_all(*groups: ProcessGroup) -> None:
    """Wait for the device, raise the error of the check that counted something, and reset the counts. Collective for
    checks with a group; costs nothing if nothing was added since the last read.

    Args:
        *groups: Process groups, or groups that forward to one (see `buffers.groups`), over which the ranks decide
            together, one after the other: if one rank has an error, all raise one. Each costs one small all-reduce and
            a wait for the device. In a job with several expert-parallel groups, usually the world; all its ranks must
            call.

    Raises:
        EPError: Of the oldest check that counted something; errors of other checks are in its notes. If only another
            rank of `groups` has an error: one of the same class, or PeerError.
    """
    raise_together(_read([check for _, check in sorted(_live.items())]), *groups)


def raise_together(error: EPError | None, *groups: ProcessGroup) -> None:
    """Raise on every rank of the groups if one of them has an error. Collective, as `read_all`.

    Args:
        error: This rank's own; None = it has none.
        *groups: See `read_all`. Without one, this rank decides alone.

    Raises:
        EPError: See `read_all`.
    """
    if groups:
        error = _decide_together(error, groups)
    if error is not None:
        raise error


def forget(group: ProcessGroup) -> None:
    """Drop the checks of a group whose buffer is destroyed. An output that a user keeps may keep them on one rank and
    not on another, and a later read is collective.

    Args:
        group: Process group of the checks.
    """
    dropped = [(number, check) for number, check in _live.items() if check.group is group]
    for number, _ in dropped:
        del _live[number]
    if any(check._touched for _, check in dropped):
        logger.warning(
            "a buffer was destroyed before the checks of its last dispatches were read: do not step on their gradients"
        )


def _read(checks: list[DeviceCheck]) -> EPError | None:
    """Read checks with one gather per group and one copy to the host per group and device."""
    alike: dict[tuple[ProcessGroup | None, torch.device], list[DeviceCheck]] = {}
    for check in checks:
        if check.waiting:
            alike.setdefault((None if _closed(check.group) else check.group, check.count.device), []).append(check)
    errors = []
    for (group, _), members in alike.items():
        counts = torch.cat([check.count for check in members])
        if group is not None:
            gathered = counts.new_empty(group.size(), len(members))
            dist.all_gather(list(gathered), counts, group=group)  # torch 2.13 deprecates the gather into one tensor
            counts = gathered
        by_rank = counts.view(-1, len(members)).tolist()
        for i, check in enumerate(members):
            check.reset()
            found = {rank: row[i] for rank, row in enumerate(by_rank) if row[i]}
            error = check.to_error(found) if found else None
            if error is not None:
                errors.append(error)
    for other in errors[1:]:
        errors[0].add_note(str(other))
    return errors[0] if errors else None


def largest(mine: int, *groups: ProcessGroup) -> int:
    """The largest number that a rank has. Collective over each group in turn, so over all ranks that they reach
    together. Groups as in `read_all`."""
    known = [registered(group) for group in groups]
    number = torch.tensor([mine], device="cpu" if "gloo" in dist.get_backend(known[0]) else "cuda")
    for group in known:
        dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
    return int(number)


def _decide_together(error: EPError | None, groups: tuple[ProcessGroup, ...]) -> EPError | None:
    """The error that this rank raises: its own, or one of the most severe class that another rank has."""
    mine = 0 if error is None else 1 + max(n for n, kind in enumerate(_ELSEWHERE) if n == 0 or isinstance(error, kind))
    gravest = largest(mine, *groups)
    if gravest == mine:
        return error
    elsewhere = _ELSEWHERE[gravest - 1](
        "this rank must not step, because another expert-parallel group of the job has an error",
        needed="one decision of all ranks that step together, so that their weights belong to the same step",
        fix="read the error of the ranks whose message has `found:`; to repeat the step, repeat it on all ranks",
    )
    if error is not None:
        elsewhere.add_note(str(error))
    return elsewhere


def _closed(group: ProcessGroup | None) -> bool:
    """Whether the group was destroyed: an output that the user keeps can keep a check alive longer than its group."""
    try:
        return group is not None and not dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return True


@functools.cache
def _hook_into_optimizers() -> None:
    """Register the hook once, with the first check."""
    register_optimizer_step_pre_hook(_before_step)


_callers_that_read = 0


@contextlib.contextmanager
def read_by_caller() -> Iterator[None]:
    """Turn the hook off around an optimizer's step or its capture into a CUDA graph: the caller reads, also before each
    replay."""
    global _callers_that_read
    _callers_that_read += 1
    try:
        yield
    finally:
        _callers_that_read -= 1


def _before_step(*_: object) -> None:
    """Read before the first of several optimizers steps; the others find nothing new."""
    if _callers_that_read:
        return
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        read_all()
    elif _live:
        raise EPError(
            "an optimizer's step is being captured into a CUDA graph, in which the checks before it do not run",
            found="checks of sync-free dispatches or of recompute that are read before each step",
            needed="a read before each replay; without it, training goes on unnoticed after rows were dropped",
            fix="call megatron_ep_v2.device_checks.read_all() before each graph.replay(), and capture inside "
            "`with megatron_ep_v2.device_checks.read_by_caller():`",
        )
