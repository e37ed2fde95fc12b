"""Who comes last to the dispatches: the summary, by hand and in a group."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch

import megatron_ep_v2
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.watchdog.completion import GpuClock, HostClock
from megatron_ep_v2.watchdog.stragglers import Arrival, summarize
from tests.helpers.harness import HANG, isolated, run_ranks
from tests.helpers.stalls import CULPRIT, RANKS, layer, rows, start


def test_the_summary_of_arrivals() -> None:
    """Rank 0 comes 5 ms before rank 1; rank 2 comes 20 ms after it, but for one dispatch, to which it comes first."""
    waits = {
        0: {1: 0.125, 2: 0.125, 3: 0.225, 4: 0.105},
        1: {1: 0.120, 2: 0.120, 3: 0.220, 4: 0.100, 9: 1.0},
        2: {1: 0.100, 2: 0.100, 3: 0.200, 4: 0.110},
    }
    summary = summarize(waits)
    assert summary.dispatches == 4, "the ninth was seen by one rank only"
    rounded = [(a.rank, a.times_last, round(a.median_ms, 6), round(a.worst_ms, 6)) for a in summary.arrivals]
    assert rounded == [(2, 3, 20.0, 20.0), (1, 1, 0.0, 5.0), (0, 0, -5.0, 0.0)]
    assert str(summary).splitlines()[2].split() == ["2", "3", "+20.00", "+20.00"]


@isolated
def straggle(group: Any) -> tuple[list[Arrival], str]:
    """Rank CULPRIT comes to each dispatch a while after all others have begun to wait in it."""
    start(10)
    layer(group, rows())
    store, others = group.get_group_store(), [rank for rank in range(RANKS) if rank != CULPRIT]
    original, number = ReferenceBuffer.dispatch, 0

    def dispatch(self: Any, *args: Any, **arguments: Any) -> Any:
        store.set(f"{number}/{group.rank()}", "waits")  # by now its watch has noted the time
        return original(self, *args, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceBuffer, "dispatch", dispatch)
        for number in range(8):
            if group.rank() == CULPRIT:
                store.wait([f"{number}/{rank}" for rank in others], timedelta(seconds=HANG))
                time.sleep(0.15)
            layer(group, rows())
    first = megatron_ep_v2.stragglers()
    assert megatron_ep_v2.stragglers(group) == first
    pool.destroy_buffers()
    with pytest.raises(UnavailableError) as caught:
        megatron_ep_v2.stragglers()
    return list(first.arrivals), str(caught.value)


@pytest.mark.slow
def test_stragglers_are_named_on_demand() -> None:
    answers = run_ranks(RANKS, straggle)
    assert all(answer == answers[0] for answer in answers)
    arrivals, error = answers[0]
    assert arrivals[0].rank == CULPRIT and arrivals[0].times_last >= 6 and arrivals[0].median_ms > 30
    assert sum(one.times_last for one in arrivals) == 9, "eight, and the one before"
    assert "MCORE_DEEPEP_V2_WATCHDOG_SECS" in error


class ClockOfAGpu(HostClock):
    """It times as many dispatches."""

    every = GpuClock.every


@isolated
def time_some(group: Any) -> list[tuple[int, int]]:
    """(step, MoE call) of the dispatches that were timed, in seven steps of fourteen layers and in a longer one."""
    start(10)
    layer(group, rows())
    watch: Any = pool.find(group).watch  # type: ignore[union-attr]
    clock = watch.clock = ClockOfAGpu()
    watch.moe_calls, timed = 0, []
    for step in range(1, 9):
        for call in range(1, (15 if step < 8 else 50)):
            before = len(clock.waits())
            layer(group, rows())
            if len(clock.waits()) > before:
                timed.append((step, call))
        torch.optim.SGD([torch.zeros(1)], lr=0.1).step()
    return timed


def test_on_a_gpu_one_dispatch_of_seven_is_timed_and_each_layer_has_its_turn() -> None:
    first, second = run_ranks(2, time_some)
    assert first == second, "the same on every rank"
    assert all(len([call for at, call in first if at == step]) == 2 for step in range(1, 8)), "of fourteen"
    assert sorted(call for step, call in first if step < 8) == list(range(1, 15)), "each once in seven steps"
    assert len([call for step, call in first if step == 8]) == 7, "also where no optimizer steps"
