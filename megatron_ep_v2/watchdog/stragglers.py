"""Which rank arrives last at the forward dispatches, and how late: a summary on demand.

A forward dispatch ends on all ranks at about the same time, when the last one has arrived. So the last rank waits
least, and the difference to the others' waits is how late it arrived. No clocks are compared, so the ranks may be on
different hosts. On a GPU the wait is measured in stream order: it is the GPU that arrives late. A rank's wait includes
packing and unpacking its own rows, so trust milliseconds, not microseconds. On a GPU one in seven dispatches is timed,
the same ones on every rank and others in each step, so that seven steps cover each layer. With MoE call m of step s
(both from 1), it is timed where s + m - 1 is a multiple of seven.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.groups import find_registered
from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.watchdog.watched_buffer import WatchedBuffer


@dataclass(frozen=True)
class Arrival:
    """Arrival of one rank at the forward dispatches, relative to the group's median rank.

    Attributes:
        rank: In the world.
        times_last: Timed dispatches at which it arrived last.
        median_ms: Median of its delay, in ms. Negative: earlier than the median rank.
        worst_ms: Largest delay, in ms.
    """

    rank: int
    times_last: int
    median_ms: float
    worst_ms: float


@dataclass(frozen=True)
class Stragglers:
    """Arrivals of all ranks; equal on every rank. `str()` is a table, with the rank that is last most often on top."""

    dispatches: int
    arrivals: tuple[Arrival, ...]

    def __str__(self) -> str:
        title = f"arrival at the last {self.dispatches} forward dispatches timed, in ms after the median rank"
        rows = [
            f"{one.rank:>6}{one.times_last:>12}{one.median_ms:>+12.2f}{one.worst_ms:>+12.2f}" for one in self.arrivals
        ]
        return "\n".join([title, f"{'rank':>6}{'times last':>12}{'median':>12}{'worst':>12}", *rows])


def stragglers(group: ProcessGroup | None = None) -> Stragglers:
    """Find the ranks that arrive last at forward dispatches since the buffer was built. Collective.

    Counts the last 256 timed dispatches; on a GPU one in seven is timed.

    Args:
        group: Process group of the experts; None = that of the oldest buffer.

    Raises:
        UnavailableError: No dispatch of the group was watched.
    """
    watched = [buffer for buffer in pool.buffers() if isinstance(buffer, WatchedBuffer)]
    known = None if group is None else find_registered(group)
    chosen = next((buffer for buffer in watched if group is None or buffer.group is known), None)
    clock = None if chosen is None else chosen.watch.clock
    if chosen is None or clock is None:
        raise UnavailableError(
            "no dispatch was watched, so the last rank to arrive is unknown",
            needed="a dispatch in a group of two or more ranks, with the watchdog on",
            fix="call it between the first dispatch and destroy_buffers(), with MCORE_DEEPEP_V2_WATCHDOG_SECS above 0",
        )
    waits: list[dict[int, float]] = [{}] * chosen.group.size()
    dist.all_gather_object(waits, clock.waits(), group=chosen.group)
    return summarize(dict(zip(dist.get_process_group_ranks(chosen.group), waits, strict=True)))


def summarize(waits: Mapping[int, Mapping[int, float]]) -> Stragglers:
    """Summarize waits: rank -> number of the call -> seconds that the rank spent in it."""
    shared = set.intersection(*(set(by_number) for by_number in waits.values()))
    last: Counter[int] = Counter()
    lateness: dict[int, list[float]] = {rank: [] for rank in waits}
    for number in shared:
        here = {rank: by_number[number] for rank, by_number in waits.items()}
        last[min(here, key=lambda rank: here[rank])] += 1
        median = statistics.median(here.values())
        for rank, seconds in here.items():
            lateness[rank].append((median - seconds) * 1e3)
    arrivals = [Arrival(rank, last[rank], statistics.median(ms), max(ms)) for rank, ms in lateness.items() if ms]
    return Stragglers(len(shared), tuple(sorted(arrivals, key=lambda one: (-one.times_last, -one.median_ms))))
