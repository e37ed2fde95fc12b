"""Who comes last to the forward dispatches, and by how much: a summary on demand.

A forward dispatch ends on all ranks at about the same time, when the last one has come. So the rank that comes last
waits least, and how much less it waits than the others is how late it came. No clocks are compared, so the ranks may be
on different hosts. On a GPU the wait is measured in the order of the stream: then the GPU is what comes late. Packing
and unpacking its own rows counts as a rank's waiting too, so trust milliseconds, not microseconds. There, one of seven
dispatches is timed, the same ones on every rank and others in each step, so that over seven steps each layer has its
turn. With MoE call m of step s (both from 1), it is timed where s + m - 1 is a multiple of seven.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.groups import find_registered
from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.watchdog.watched_buffer import WatchedBuffer


@dataclass(frozen=True)
class Arrival:
    """How one rank comes to its forward dispatches, measured against the group's median rank.

    Attributes:
        rank: Of the world.
        times_last: Timed dispatches to which it came last.
        median_ms: How much later than the median rank it usually comes. Negative: earlier.
        worst_ms: The same for the dispatch to which it came latest.
    """

    rank: int
    times_last: int
    median_ms: float
    worst_ms: float


@dataclass(frozen=True)
class Stragglers:
    """Equal on every rank. `str()` is a table; the rank that comes last most often is first."""

    dispatches: int
    arrivals: tuple[Arrival, ...]

    def __str__(self) -> str:
        title = f"arrival at the last {self.dispatches} forward dispatches timed, in ms behind the median rank"
        rows = [
            f"{one.rank:>6}{one.times_last:>12}{one.median_ms:>+12.2f}{one.worst_ms:>+12.2f}" for one in self.arrivals
        ]
        return "\n".join([title, f"{'rank':>6}{'times last':>12}{'median':>12}{'worst':>12}", *rows])


def stragglers(group: Any = None) -> Stragglers:
    """Who came last to the forward dispatches since the buffer was built; a GPU times one in seven of them. Collective.

    At most the last 256 timed ones count.

    Args:
        group: Process group of the experts; None = that of the oldest buffer.

    Raises:
        UnavailableError: No dispatch of the group was watched.
    """
    watched = [buffer for buffer in pool.buffers() if isinstance(buffer, WatchedBuffer)]
    known = find_registered(group)
    chosen = next((buffer for buffer in watched if group is None or buffer.group is known), None)
    if chosen is None:
        raise UnavailableError(
            "no dispatch was watched, so nobody knows who came last",
            needed="a dispatch in a group of two or more ranks, with the watchdog on",
            fix="call it between the first dispatch and destroy_buffers(), with MCORE_DEEPEP_V2_WATCHDOG_SECS above 0",
        )
    waits: list[Any] = [None] * chosen.group.size()
    dist.all_gather_object(waits, chosen.watch.clock.waits(), group=chosen.group)
    return summarize(dict(zip(dist.get_process_group_ranks(chosen.group), waits, strict=True)))


def summarize(waits: Mapping[int, Mapping[int, float]]) -> Stragglers:
    """waits: rank -> number of the call -> seconds that the rank spent in it."""
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
