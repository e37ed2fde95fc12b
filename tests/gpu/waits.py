"""What a piece of work launches and what the host waits for in it, from the profiler's trace.

torch's profiler waits for the device itself when it stops (`torch.autograd.profiler.profile.__exit__`), and so do we
before that, so that the trace is complete. These waits are counted in a region without any work, which ends in the same
way, and taken off; test_waits.py is the control.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

# A copy to or from pageable memory waits as well; torch makes it of an asynchronous copy and a cudaStreamSynchronize.
WAITS = {
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
}


@dataclass(frozen=True)
class Trace:
    """waits: calls of the host that wait for the device, by name. kernels: names, each as often as it ran.

    deep_ep's own wait spins on host memory and is no call: its dispatch kernel shows it, which is compiled for one way
    or the other."""

    waits: dict[str, int]
    kernels: Counter[str]


def traced(work: Callable[[], object]) -> Trace:
    """Run it once. What is compiled or loaded at a first call must have run before."""
    _wake_the_profiler()
    control = _record(_nothing)
    found = _record(work)
    return Trace(dict(Counter(found.waits) - Counter(control.waits)), found.kernels)


@functools.cache
def _wake_the_profiler() -> None:
    """The first profile of a process loads and starts CUPTI: no control for a later one."""
    _record(_nothing)


def _nothing() -> None:
    pass


def _record(work: Callable[[], object]) -> Trace:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = profiler.events() or []
    on_device = Counter(e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    return Trace(dict(Counter(e.name for e in events if e.name in WAITS)), on_device)
