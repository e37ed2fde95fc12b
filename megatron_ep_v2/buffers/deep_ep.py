"""Teardown and allocation, as shared by the wrappers of deep_ep's buffers.

A collective teardown begins with a rendezvous that has a time limit, so that a rank that failed or left cannot hang it.

Under `torch.use_deterministic_algorithms(True)`, torch fills uninitialised allocations (`fill_uninitialized_memory`, on
by default) with a kernel on the current stream, while the communication may be writing there. deep_ep refuses such
calls with a bare assertion. So the fill is off during calls of deep_ep. deep_ep writes all that it allocates except
padding rows, which are zeroed wherever they are read.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.checks import check_group_open
from megatron_ep_v2.errors import ClosedError

logger = logging.getLogger("megatron_ep_v2")

ARRIVAL_SECONDS = 10  # ranks leave a training loop within seconds of each other, or not at all

_arrivals: dict[tuple[str, str], int] = {}
_mode: Any = torch.utils.deterministic

T = TypeVar("T")


def everyone_arrives(group: ProcessGroup, purpose: str, seconds: float = ARRIVAL_SECONDS) -> bool:
    """Wait on the host, through the group's store, until all ranks arrive or the first of them gives up.

    Args:
        group: Process group.
        purpose: Name of the rendezvous; the n-th call with one purpose is the same rendezvous on all ranks.
        seconds: Time limit.

    Returns:
        The same on every rank that calls: True if all arrived; else False, after a warning that names the absent ranks
        or the lost store.
    """
    try:
        check_group_open(group)
    except ClosedError as error:
        logger.warning("%s comes too late: %s; its memory is freed when this process ends", purpose, error.what)
        return False
    members = dist.get_process_group_ranks(group)
    number = _arrivals[group.group_name, purpose] = _arrivals.get((group.group_name, purpose), 0) + 1
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
        # The first decision holds for all: a rank that arrives late must not enter a collective that others gave up.
        decision = store.compare_set(f"{prefix}/decision", "", "no" if absent else "go")
        if decision == b"go":
            return True
        found = (
            f"rank(s) {absent} did not arrive within {seconds:g} s"
            if absent
            else "the others had given up on this rank"
        )
    except RuntimeError as error:  # the process that serves the store has ended
        found = f"the group's store cannot be reached ({error})"
    logger.warning("%s was given up: %s; its memory is freed when this process ends", purpose, found)
    return False


# ------------------------------------------------------------------------------- calls under torch's deterministic mode


def memory_left_as_it_is(call: Callable[..., T]) -> Callable[..., T]:
    """Wrap a function of deep_ep so that torch's fill is off while it runs. Wrap it for each call, because the mode can
    change at any time."""
    if not (torch.are_deterministic_algorithms_enabled() and _mode.fill_uninitialized_memory):
        return call
    return functools.partial(_call_unfilled, call)


def _call_unfilled(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    _log_once()
    _mode.fill_uninitialized_memory = False
    try:
        return call(*args, **kwargs)
    finally:
        _mode.fill_uninitialized_memory = True


@functools.cache
def _log_once() -> None:
    logger.info(
        "torch's deterministic mode fills uninitialised memory; what deep_ep allocates is left out, because deep_ep "
        "may be writing there at the same time"
    )
