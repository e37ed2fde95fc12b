"""The rendezvous before a collective teardown: all ranks go on or none, and none waits for one that does not
arrive."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ep_v2.buffers.deep_ep import everyone_arrives
from tests.helpers.harness import HANG, run_ranks
from tests.helpers.reports import log_records

LATE = 1


def arrive(group: Any, delay: float | None, seconds: float, barrier: bool = True) -> tuple[bool, str]:
    """Rank 1 arrives `delay` seconds late; None = when the others have left. What was decided, and the warning."""
    if group.rank() == LATE and delay is None:
        others = [f"{rank} has left" for rank in range(group.size()) if rank != LATE]
        group.get_group_store().wait(others, timedelta(seconds=HANG))
    elif group.rank() == LATE:
        time.sleep(delay)
    if group.rank() != LATE:  # the others arrive together
        others, store = [rank for rank in range(group.size()) if rank != LATE], group.get_group_store()
        store.set(f"{group.rank()} arrives", "")
        store.wait([f"{rank} arrives" for rank in others], timedelta(seconds=HANG))
    with log_records() as records:
        decided = everyone_arrives(group, "test", seconds)
    if group.rank() != LATE and delay is None:
        group.get_group_store().set(f"{group.rank()} has left", "")
    if barrier:
        dist.barrier(group)
    return decided, " ".join(record.getMessage() for record in records)


def test_all_ranks_arrive() -> None:
    assert run_ranks(4, arrive, 0.3, HANG) == [(True, "")] * 4


@pytest.mark.slow
def test_a_late_rank_is_named_and_finds_that_the_others_gave_up() -> None:
    answers = run_ranks(4, arrive, None, 3.0)
    assert not any(decided for decided, _ in answers), "all or none may enter the collective"
    for rank, (_, warning) in enumerate(answers):
        assert "was given up" in warning
        assert ("had given up on this rank" if rank == LATE else f"rank(s) [{LATE}] did not arrive") in warning


def too_late(group: Any) -> tuple[bool, str]:
    dist.destroy_process_group()
    return arrive(group, 0.0, 5.0, barrier=False)


def test_a_group_that_is_gone_is_no_reason_to_hang_or_to_raise() -> None:
    for decided, warning in run_ranks(2, too_late):
        assert not decided and "comes too late" in warning


def twice(group: Any) -> list[bool]:
    return [everyone_arrives(group, "test"), everyone_arrives(group, "test")]


def test_rendezvous_of_one_purpose_are_counted() -> None:
    assert run_ranks(2, twice) == [[True, True]] * 2
