"""Meeting before a collective teardown, with a time limit: nothing hangs because one rank failed or left."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_ep_v2.buffers.checks import check_group_open
from megatron_ep_v2.errors import ClosedError

logger = logging.getLogger("megatron_ep_v2")

MEETING_SECONDS = 10  # ranks leave a training loop within seconds of each other, or not at all

_meetings: dict[tuple[str, str], int] = {}


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
