"""Checks whose answer is on the device: counted there without a host wait, read once before the optimizer's step.

A check that asked the device at once would stop the host in every layer. Here each call adds its violations to an
integer that stays on the device, also inside a captured CUDA graph; before the next optimizer's step the host reads all
of them in one copy, and raises the error of the check that counted something. No weight has changed by then.

The read is a hook of torch's optimizers, which Megatron's own step inside (read in 0.16.1 and 0.19.2; the distributed
optimizer too): after the gradients were reduced, clipped and found finite, before the first parameter changes. A step
that Megatron skips because its gradients are not finite reads nothing; the counts wait for the next one. A loop without
an optimizer of torch's calls `read_all()` itself.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_ep_v2.errors import EPError

_numbers = itertools.count()
_live: weakref.WeakValueDictionary[int, DeviceCheck] = weakref.WeakValueDictionary()  # by age, as on the other ranks


class DeviceCheck:
    """An integer on the device that stays 0 while all is well. Lives as long as somebody holds it.

    Args:
        to_error: Makes the error from `{rank: count}`, the ranks that counted something; never called with none.
        device: Where the violations are.
        group: Read together: every rank of it gets the counts of all and raises the same error, by one small
            all-gather at the read. Every rank of the group must make its checks in the same order and add to the same
            ones between two reads, as calls that are collective do, and come to the same reads: where one of them steps
            an optimizer, all do. None, or a group that was destroyed meanwhile: each rank for itself, as rank 0.

    Attributes:
        count: [1] int32 on the device. Code that writes it by itself (a kernel) calls `touch()`, too.
    """

    def __init__(self, to_error: Callable[[dict[int, int]], EPError], device: torch.device, group: Any = None):
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
        _read([self])

    @property
    def waiting(self) -> bool:
        """Whether a read has something to look at."""
        return self._touched or self._captured

    def reset(self) -> None:
        """Forget what was counted."""
        self.count.zero_()
        self._touched = False


def read_all() -> None:
    """Wait for the device, raise the error of the check that counted something, and begin anew at 0. Costs nothing
    where nothing was added since the last read. Collective for checks with a group.

    Raises:
        EPError: Of the oldest check that counted something; what the others counted stands in its notes.
    """
    _read([check for _, check in sorted(_live.items())])


def _read(checks: list[DeviceCheck]) -> None:
    """One gather for each group, one copy to the host for each group and device: nearly always one in all."""
    alike: dict[tuple[Any, torch.device], list[DeviceCheck]] = {}
    for check in checks:
        if check.waiting:
            alike.setdefault((None if _closed(check.group) else check.group, check.count.device), []).append(check)
    errors = []
    for (group, _), members in alike.items():
        counts = torch.cat([check.count for check in members])
        if group is not None:
            everyone = counts.new_empty(group.size() * len(members))
            dist.all_gather_into_tensor(everyone, counts, group=group)
            counts = everyone
        by_rank = counts.view(-1, len(members)).tolist()
        for i, check in enumerate(members):
            check.reset()
            found = {rank: row[i] for rank, row in enumerate(by_rank) if row[i]}
            if found:
                errors.append(check.to_error(found))
    if errors:
        for other in errors[1:]:
            errors[0].add_note(str(other))
        raise errors[0]


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


def _before_step(*_: Any) -> None:
    """Several optimizers step one after the other: the first reads, the others find nothing new to read. One that steps
    inside a CUDA graph cannot be made to wait: such a loop reads by itself."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        read_all()
