"""What the wrappers of deep_ep's buffers share.

A collective teardown begins with a rendezvous that has a time limit: nothing hangs because one rank failed or left.

Under `torch.use_deterministic_algorithms(True)`, torch fills everything that it allocates without a value
(`fill_uninitialized_memory`, on by default): a kernel on the current stream, at the same time as the communication that
writes there. deep_ep refuses to be called like that, with a bare assertion. So the fill is off while deep_ep is called,
and only then; what deep_ep allocates it also writes, but for padding rows, which are zeroed where anybody reads them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_ep_v2.buffers.checks import check_group_open
from megatron_ep_v2.errors import ClosedError

logger = logging.getLogger("megatron_ep_v2")

MEETING_SECONDS = 10  # ranks leave a training loop within seconds of each other, or not at all

_meetings: dict[tuple[str, str], int] = {}
_mode: Any = torch.utils.deterministic

T = TypeVar("T")


def everyone_arrives(group: Any, purpose: str, seconds: float = MEETING_SECONDS) -> bool:
    """Wait on the host, through the group's store, until all ranks are here, or until the first of them gives up.

    Args:
        group: Process group.
        purpose: Names the meeting; the n-th meeting of one purpose is one meeting on all ranks.
        seconds: How long to wait.

    Returns:
        The same on every rank that asks: True when all arrived; else False, after a warning that names the absent ranks
        or the lost store.
    """
    try:
        check_group_open(group)
    except ClosedError as error:
        logger.warning("%s comes too late: %s; its memory is freed when this process ends", purpose, error.what)
        return False
    members = dist.get_process_group_ranks(group)
    number = _meetings[group.group_name, purpose] = _meetings.get((group.group_name, purpose), 0) + 1
    prefix = f"megatron_ep_v2/{group.group_name}/{purpose}/{number}"
    keys = [f"{prefix}/{rank}" for rank in members]
    try:
        store = group.get_group_store()
        store.set(f"{prefix}/{dist.get_rank()}", "here")
        absent: list[int] = []
        try:
            store.wait(keys, timedelta(seconds=seconds))
        except RuntimeError:  # a time-out is DistStoreError on TCP and a plain RuntimeError on files
            absent = [rank for rank, key in zip(members, keys, strict=True) if not store.check([key])]
        # The first to decide decides for all: a rank that comes late must not enter what the others have given up.
        decision = store.compare_set(f"{prefix}/decision", "", "no" if absent else "go")
        if decision == b"go":
            return True
        found = (
            f"rank(s) {absent} did not arrive within {seconds:g} s"
            if absent
            else "the others had given up on this rank"
        )
    except RuntimeError as error:  # the store's server went with its process
        found = f"the group's store cannot be reached ({error})"
    logger.warning("%s was given up: %s; its memory is freed when this process ends", purpose, found)
    return False


# ------------------------------------------------------------------------------- calls under torch's deterministic mode


def memory_left_as_it_is(call: Callable[..., T]) -> Callable[..., T]:
    """A call of deep_ep, during which torch's fill is off; the call itself where it is off anyway. Ask for each call:
    the mode may be turned on at any time."""
    if not (torch.are_deterministic_algorithms_enabled() and _mode.fill_uninitialized_memory):
        return call
    return functools.partial(_call_unfilled, call)


def _call_unfilled(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    _say_so()
    _mode.fill_uninitialized_memory = False  # a property of the module
    try:
        return call(*args, **kwargs)
    finally:
        _mode.fill_uninitialized_memory = True


@functools.cache
def _say_so() -> None:
    """Once, not in every call."""
    logger.info(
        "torch's deterministic mode fills uninitialised memory; what deep_ep allocates is left out, because deep_ep "
        "may be writing there at the same time"
    )
