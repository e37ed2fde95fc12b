"""Checks whose answer is on the device: counted there without a host wait, read once before the optimizer's step.

A check that asked the device at once would stop the host in every layer. Here each call adds its violations to an
integer that stays on the device, also inside a captured CUDA graph; before the next optimizer's step the host reads all
of them in one copy, and raises the error of the check that counted something.

Who reads:

- Under `install()`, Megatron's optimizers (`megatron.optimizer_step`), before they look at a gradient, also where it
  is replayed from a CUDA graph. All ranks of the model decide together: where one group's check counted something,
  every rank raises, and no rank changes a weight.
- Any other optimizer of torch's, in a hook before the first parameter changes. Ranks of one expert-parallel group
  decide together; those of other groups do not know. A job with several groups calls `read_all(group of all its ranks)`
  before it steps.
- A loop that captures its own optimizer's step into a CUDA graph, in which hooks do not run: it calls `read_all()`
  before each replay, and says so with `read_by_caller()` around the capture, without which the capture is refused.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_ep_v2.buffers.groups import registered
from megatron_ep_v2.errors import EPError, LayoutOverflowError, PeerError, RoutingChangedError

logger = logging.getLogger("megatron_ep_v2")

_numbers = itertools.count()
# What a rank raises because another one's check did, the gravest last: whoever repeats a step must not repeat that one.
_ELSEWHERE: tuple[type[EPError], ...] = (PeerError, LayoutOverflowError, RoutingChangedError)
_live: weakref.WeakValueDictionary[int, DeviceCheck] = weakref.WeakValueDictionary()  # by age, as on the other ranks
os.register_at_fork(after_in_child=_live.clear)  # a forked child that steps an optimizer must not read for its parent


class DeviceCheck:
    """An integer on the device that stays 0 while all is well. Lives as long as somebody holds it.

    Args:
        to_error: Makes the error from `{rank: count}`, the ranks that counted something; never called with none. None =
            no error: it has said what there was to say.
        device: Where the violations are.
        group: Read together: every rank of it gets the counts of all and raises the same error, by one small
            all-gather at the read. Every rank of the group must make its checks in the same order and add to the same
            ones between two reads, as calls that are collective do, and come to the same reads: where one of them steps
            an optimizer, all do. None, or a group that was destroyed meanwhile: each rank for itself, as rank 0.

    Attributes:
        count: [1] int32 on the device. Code that writes it by itself (a kernel) calls `touch()`, too.
    """

    def __init__(self, to_error: Callable[[dict[int, int]], EPError | None], device: torch.device, group: Any = None):
        self.to_error, self.group = to_error, group
        with torch.inference_mode(False):  # one made there could not be written to in training
            self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self._touched = self._captured = False
        _live[next(_numbers)] = self
        _hook_into_optimizers()

    def add(self, violations: torch.Tensor) -> None:
        """Count, with no host wait. violations: bool (each True is one) or integers (added up), of any shape."""
        self.count += violations.sum(dtype=torch.int32)
        self.touch()

    def touch(self) -> None:
        """Have the next read look at `count`. A check that a CUDA graph writes is looked at by every read from now on,
        because nobody says when the graph is replayed."""
        self._touched = True
        self._captured = self._captured or (self.count.is_cuda and torch.cuda.is_current_stream_capturing())

    def read(self) -> None:
        """Wait for the device and raise if something was counted; collective where there is a group."""
        error = _read([self])
        if error is not None:
            raise error

    @property
    def waiting(self) -> bool:
        """Whether a read has something to look at."""
        return self._touched or self._captured

    def reset(self) -> None:
        """Forget what was counted."""
        self.count.zero_()
        self._touched = False


def read_all(*groups: Any) -> None:
    """Wait for the device, raise the error of the check that counted something, and begin again at 0. Collective for
    checks with a group; costs nothing where nothing was added since the last read.

    Args:
        *groups: Process groups, or ones that forward to them (see `buffers.groups`), over which the ranks decide
            together, one after the other: where a rank has an error, all of them raise one. One small all-reduce each,
            and a wait for the device. Usually the world, in a job with several expert-parallel groups; all ranks of it
            must call.

    Raises:
        EPError: Of the oldest check that counted something; what the others counted stands in its notes. Where only
            another rank of `groups` has an error: one of the same class, or PeerError.
    """
    error = _read([check for _, check in sorted(_live.items())])
    if groups:
        error = _decide_together(error, tuple(map(registered, groups)))
    if error is not None:
        raise error


def forget(group: Any) -> None:
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
    """One gather for each group, one copy to the host for each group and device: nearly always one in all."""
    alike: dict[tuple[Any, torch.device], list[DeviceCheck]] = {}
    for check in checks:
        if check.waiting:
            alike.setdefault((None if _closed(check.group) else check.group, check.count.device), []).append(check)
    errors = []
    for (group, _), members in alike.items():
        counts = torch.cat([check.count for check in members])
        if group is not None:
            everyone = counts.new_empty(group.size(), len(members))
            dist.all_gather(list(everyone), counts, group=group)  # torch 2.13 deprecates the one into a single tensor
            counts = everyone
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


def _decide_together(error: EPError | None, groups: tuple[Any, ...]) -> EPError | None:
    """The error that this rank raises: its own, or for that of another rank one of the gravest class."""
    mine = 0 if error is None else 1 + max(n for n, kind in enumerate(_ELSEWHERE) if n == 0 or isinstance(error, kind))
    on_cpu = "gloo" in dist.get_backend(groups[0])
    worst = torch.tensor([mine], device="cpu" if on_cpu else "cuda")
    for group in groups:
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
    gravest = int(worst)
    if gravest == mine:
        return error
    elsewhere = _ELSEWHERE[gravest - 1](
        "this rank must not step, because another expert-parallel group of the job has an error",
        needed="one decision of all ranks that step together, so that their weights stay those of one step",
        fix="read the error of the ranks that say what was found; whoever repeats the step repeats it on all ranks",
    )
    if error is not None:
        elsewhere.add_note(str(error))
    return elsewhere


def _closed(group: Any) -> bool:
    """Whether the group was destroyed: an output that the user keeps can keep a check beyond that."""
    try:
        return group is not None and not dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return True


@functools.cache
def _hook_into_optimizers() -> None:
    """Once, with the first check."""
    register_optimizer_step_pre_hook(_before_step)


_callers_that_read = 0


@contextlib.contextmanager
def read_by_caller() -> Iterator[None]:
    """Around an optimizer's step, or its capture into a CUDA graph: the hook does not read, the caller has, and does so
    again before each replay."""
    global _callers_that_read
    _callers_that_read += 1
    try:
        yield
    finally:
        _callers_that_read -= 1


def _before_step(*_: Any) -> None:
    """Several optimizers step one after the other: the first reads, the others find nothing new to read."""
    if _callers_that_read:
        return
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        read_all()
    elif _live:
        raise EPError(
            "an optimizer's step is being captured into a CUDA graph, in which the checks before it do not run",
            found="checks of sync-free dispatches or of recompute that are read before each step",
            needed="a read before each replay, or rows that were dropped are trained on unseen",
            fix="call megatron_ep_v2.device_checks.read_all() before each graph.replay(), and capture inside "
            "`with megatron_ep_v2.device_checks.read_by_caller():`",
        )
