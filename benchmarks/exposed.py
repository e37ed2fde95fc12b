"""How much of the communication in a profiler's trace runs beside compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]


@dataclass(frozen=True)
class Share:
    """Of one step on one GPU, in microseconds.

    Attributes:
        step: From the first kernel's start to the last one's end.
        communication: Some kernel of deep_ep runs.
        exposed: Some kernel of deep_ep runs, and no other kernel.
    """

    step: float
    communication: float
    exposed: float


def profiled(run: Callable[[], Any]) -> Share:
    """Run once under the profiler."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [
        (event.name, (event.time_range.start, event.time_range.end))
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return share(kernels)


def share(kernels: Iterable[tuple[str, Interval]]) -> Share:
    """From the names and times of kernels."""
    kernels = list(kernels)
    communication = union(times for name, times in kernels if "deep_ep" in name)
    compute = union(times for name, times in kernels if "deep_ep" not in name)
    everything = union(times for _, times in kernels)
    both = length(communication) + length(compute) - length(everything)
    total = length(communication)
    step = everything[-1][1] - everything[0][0] if everything else 0.0
    return Share(step=step, communication=total, exposed=total - both)


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
