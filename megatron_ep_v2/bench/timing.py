"""Timing: ranks start together, the slowest rank counts, and noisy repeats are marked."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

IN_A_ROW = 8  # layers without a pause on a GPU, as in training
NOISY_HALVES = 0.10  # medians of the repeats' halves that differ by more than this
NOISY_SPREAD = 1.30  # 80th over 20th percentile above this
_CLEAR_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Summary:
    """Summary of one variant's repeats, in microseconds.

    Attributes:
        noise: Why the median cannot be trusted, or "".
    """

    median: float
    p20: float
    p80: float
    noise: str


def summarise(values: Sequence[float]) -> Summary:
    """Summarize repeats; noisy if two halves of them (every other one, or first and last) have different medians, or if
    they are widely spread."""
    if len(values) < 4:
        middle = statistics.median(values)
        return Summary(middle, min(values), max(values), "fewer than 4 repeats")
    quintiles = statistics.quantiles(values, n=5)
    middle = len(values) // 2
    halves = ((values[::2], values[1::2]), (values[:middle], values[middle:]))
    apart = max(abs(statistics.median(a) / statistics.median(b) - 1) for pair in halves for a, b in (pair, pair[::-1]))
    spread = quintiles[3] / quintiles[0]
    noise = ""
    if apart > NOISY_HALVES:
        noise = f"two halves of the repeats differ by {apart:.0%}"
    elif spread > NOISY_SPREAD:
        noise = f"the 80th percentile is {spread:.2f} x the 20th"
    return Summary(statistics.median(values), quintiles[0], quintiles[3], noise)


def measure(run: Callable[[], None], device: torch.device, count: int = 1) -> tuple[float, float]:
    """Microseconds of a run divided by `count`, its number of layers: on the device, and of the host until `run`
    returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        dist.barrier(device_ids=[device.index])
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        begin = time.perf_counter()
        run()
        host = time.perf_counter() - begin
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / count, host * 1e6 / count
    dist.barrier()
    begin = time.perf_counter()
    run()
    host = time.perf_counter() - begin
    return host * 1e6 / count, host * 1e6 / count


def slowest_rank(values: Sequence[float], device: torch.device) -> list[float]:
    """Largest value of any rank, for each repeat."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def peak_memory(run: Callable[[], None], device: torch.device) -> int | None:
    """Bytes of a run's peak above the memory in use before: torch's allocator on a GPU, the resident set on a CPU (None
    if it cannot be measured)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _CLEAR_PEAK.write_text("5")
    except OSError:  # not on Linux
        return None
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def measure_link(device: torch.device, repeats: int = 5) -> float:
    """GB/s that the slowest rank sends to the others in a plain all_to_all_single of large equal blocks."""
    ranks = dist.get_world_size()
    block = (32 if device.type == "cuda" else 2) * 2**20
    outgoing = torch.zeros(ranks * block, dtype=torch.uint8, device=device)
    incoming = torch.empty_like(outgoing)

    count = IN_A_ROW if device.type == "cuda" else 1

    def run() -> None:
        for _ in range(count):
            dist.all_to_all_single(incoming, outgoing)

    run()
    times = [measure(run, device, count)[0] for _ in range(repeats)]
    return (ranks - 1) * block / statistics.median(slowest_rank(times, device)) / 1e3


def _status(name: str) -> int:
    line: Any = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
