"""What a trace of the profiler says of a GPU: how long it is busy, how much communication runs next to compute."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]
NAME_CHARACTERS = 100  # of a kernel in a trace
_LONGEST = 8  # kernels that `Activity` names


@dataclass(frozen=True)
class Activity:
    """Of one run on one GPU, in microseconds.

    Attributes:
        span: From the start of the first kernel or copy to the end of the last one.
        idle: Of the span, while nothing runs. Where the host launches each kernel, the profiler makes it longer.
        computing: See `computing`.
        communication: Some kernel of deep_ep runs. It may only wait for another rank.
        exposed: Some kernel of deep_ep runs, and no other kernel; a copy hides nothing.
        launches: Kernels and copies.
        longest: Name -> time of all its launches together, of the kernels that take most.
    """

    span: float
    idle: float
    computing: float
    communication: float
    exposed: float
    launches: int
    longest: dict[str, float]


def activity(run: Callable[[], object], trace: Path | None = None) -> Activity:
    """Run once under the profiler.

    Args:
        run: Whatever it queues is waited for.
        trace: Write its kernels and copies to this file (.json.gz), a line for each stream, for
            https://ui.perfetto.dev.
    """
    events = _device_events(run)
    if trace:
        write_trace(trace, [(event.name, event.device_resource_id, *_times(event)) for event in events])
    return activity_of((event.name, _times(event)) for event in events)


def activity_of(events: Iterable[tuple[str, Interval]]) -> Activity:
    """From the names and times of kernels and copies."""
    events = list(events)
    by_name: dict[str, float] = {}
    for name, (start, end) in events:
        name = name[:NAME_CHARACTERS]
        by_name[name] = by_name.get(name, 0.0) + end - start
    span = max(end for _, (_, end) in events) - min(start for _, (start, _) in events) if events else 0.0
    kernels = [(name, times) for name, times in events if not name.startswith(("Memcpy", "Memset"))]
    communication = length(union(times for name, times in kernels if "deep_ep" in name))
    others = length(union(times for name, times in kernels if "deep_ep" not in name))
    longest = sorted(by_name, key=lambda name: by_name[name], reverse=True)[:_LONGEST]
    return Activity(
        span=span,
        idle=span - length(union(times for _, times in events)),
        computing=computing(events),
        communication=communication,
        exposed=length(union(times for _, times in kernels)) - others,
        launches=len(events),
        longest={name: by_name[name] for name in longest},
    )


def computing(events: Iterable[tuple[str, Interval]]) -> float:
    """Microseconds in which the GPU computes or moves something. Communication is left out: its kernels wait for other
    ranks, whose hosts the profiler slows down, too."""
    return length(union(times for name, times in events if "deep_ep" not in name and "nccl" not in name))


@dataclass(frozen=True)
class Exposure:
    """Of the rank with the largest exposed share of a run, in microseconds. Attributes as in `Activity`."""

    span: float
    communication: float
    exposed: float

    @property
    def share(self) -> float:
        """Of the run."""
        return self.exposed / self.span if self.span else 0.0


def most_exposed(mine: Activity, device: torch.device) -> Exposure:
    """The same on every rank; collective."""
    values = torch.tensor([mine.span, mine.communication, mine.exposed], device=device, dtype=torch.float64)
    by_rank = values.new_empty(dist.get_world_size(), 3)
    dist.all_gather(list(by_rank), values)
    return max((Exposure(*row) for row in by_rank.tolist()), key=lambda each: each.share)


def _device_events(run: Callable[[], object]) -> list[FunctionEvent]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [
        event
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def _times(event: FunctionEvent) -> Interval:
    return event.time_range.start, event.time_range.end


def write_trace(path: Path, kernels: Iterable[tuple[str, int, float, float]]) -> None:
    """Kernels (name, stream, start and end in microseconds) in the format of chrome://tracing, gzipped."""
    kernels = sorted(kernels, key=lambda kernel: kernel[2])
    events = [
        {
            "name": name[:NAME_CHARACTERS],
            "ph": "X",
            "pid": 0,
            "tid": stream,
            "ts": round(start - kernels[0][2], 1),
            "dur": round(end - start, 1),
        }
        for name, stream, start, end in kernels
    ]
    streams = sorted({stream for _, stream, _, _ in kernels})
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": stream, "args": {"name": f"stream {stream}"}}
        for stream in streams
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [*names, *events]}).encode(), mtime=0))


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint and in order."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
