"""Times that can be trusted: ranks start together, cases take turns, the slowest rank counts, noise is called noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
import torch.distributed as dist

IN_A_ROW = 8  # layers without a pause on a GPU, as in training
ALONE_AND_IN_A_ROW = {"alone": 1, "in_a_row": IN_A_ROW}  # from an idle device; and as in training
IN_A_GRAPH = 20  # calls
_QUEUED_CYCLES = 2_000_000  # about 1 ms of the device, in which the host queues what is timed
NOISY_HALVES = 0.10  # medians of the repeats' halves that differ by more than this
NOISY_SPREAD = 1.30  # 80th over 20th percentile above this
_CLEAR_PEAK = Path("/proc/self/clear_refs")

K = TypeVar("K")
Run: TypeAlias = Callable[[], object]  # also a `calls.Layer`


@dataclass(frozen=True)
class Summary:
    """Of one variant's repeats, in microseconds.

    Attributes:
        noise: Why the median is not to be trusted, or "".
    """

    median: float
    p20: float
    p80: float
    noise: str


def summarise(values: Sequence[float]) -> Summary:
    """Median, p20, p80; noisy if two halves of the repeats (every other one, or first and last) tell different medians
    or if the repeats are widely spread."""
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


def measure(
    run: Callable[[], object], device: torch.device, count: int = 1, *, queued: bool = False
) -> tuple[float, float]:
    """Time one run: from ranks that start together on an idle device to its end there.

    Args:
        run: What is timed; what it returns is dropped.
        device: Its clock on a GPU (CUDA events), the host's on a CPU.
        count: Layers in it, by which its time is divided.
        queued: On a GPU, keep the device busy until everything is queued: no launch falls into the time. The run must
            not wait for the device; ranks do not wait for each other.

    Returns:
        `(device_us, host_us)`: microseconds on the device, and of the host until the run returned.
    """
    if device.type != "cuda":
        _start_together(device)
        begin = time.perf_counter()
        run()
        host = time.perf_counter() - begin
        return host * 1e6 / count, host * 1e6 / count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if queued:
        torch.cuda.synchronize()
        torch.cuda._sleep(_QUEUED_CYCLES)
    else:
        _start_together(device)
    start.record()
    begin = time.perf_counter()
    run()
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / count, host * 1e6 / count


def _start_together(device: torch.device) -> None:
    """All ranks here, with nothing left to do on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        if dist.get_world_size() > 1:
            dist.barrier(device_ids=[device.index])
            torch.cuda.synchronize()
    elif dist.get_world_size() > 1:
        dist.barrier()


def alternate(
    cases: Iterable[K],
    take: Callable[[K], Mapping[str, float]],
    repeats: int,
    device: torch.device,
    *,
    warmup: int = 0,
    swap: bool = False,
    after_round: Callable[[int, int], None] | None = None,
) -> dict[K, dict[str, list[float]]]:
    """Rounds of all cases in turn, so that what changes on the machine changes for all of them; collective.

    Args:
        take: One case, once: its times by kind.
        repeats: Rounds that count.
        device: Of the ranks' collectives.
        warmup: Rounds before them.
        swap: Every other round goes from the last case to the first.
        after_round: Called with the rounds done and `repeats`.

    Returns:
        Case -> kind -> a value for each round, the largest of any rank.
    """
    order = list(cases)
    times: dict[K, dict[str, list[float]]] = {case: {} for case in order}
    for repeat in range(-warmup, repeats):
        for case in order[:: -1 if swap and repeat % 2 else 1]:
            for kind, value in take(case).items():
                if repeat >= 0:
                    times[case].setdefault(kind, []).append(value)
        if after_round and repeat >= 0:
            after_round(repeat + 1, repeats)
    return {
        case: {kind: slowest_rank(values, device) for kind, values in by_kind.items()}
        for case, by_kind in times.items()
    }


def time_runs(
    runs: Mapping[K, Run],
    repeats: int,
    device: torch.device,
    kinds: Mapping[str, int] = ALONE_AND_IN_A_ROW,
    *,
    warmup: int = 3,
    queued: bool = False,
    swap: bool = False,
) -> dict[K, dict[str, list[float]]]:
    """`alternate` over plain calls.

    Args:
        runs: Case -> what is timed. One with `forward` and `backward` (see `calls.Layer`) is run forward as often as a
            kind says and then backward, as in training.
        kinds: Kind -> how often it runs without a pause; its time is of one.
        warmup, queued, swap: As in `alternate` and `measure`.

    Returns:
        Case -> kind -> microseconds for each round, of the slowest rank.
    """

    def take(case: K) -> dict[str, float]:
        run = runs[case]
        return {
            kind: measure(lambda: repeated(run, count), device, count, queued=queued)[0]  # noqa: B023
            for kind, count in kinds.items()
        }

    return alternate(runs, take, repeats, device, warmup=warmup, swap=swap)


def repeated(run: Run, count: int) -> None:
    """`count` runs without a pause: of a layer in two halves, all forward and then all backward."""
    if hasattr(run, "forward") and hasattr(run, "backward"):
        run.backward([run.forward() for _ in range(count)])
    else:
        for _ in range(count):
            run()


def time_in_graphs(runs: Mapping[K, Run], repeats: int, device: torch.device) -> dict[K, float]:
    """Microseconds of one call on the GPU, without what the host takes to launch it: a CUDA graph of `IN_A_GRAPH` calls
    is replayed, the time divided. Medians over repeats, of the slowest rank; runs alternate.

    What is left of launches is the gap between a graph's kernels, about 1 us each. Inputs that fit in the L2 cache are
    read from there.

    Args:
        runs: They may not wait for the device, nor go through autograd's backward, which has streams of its own.
    """
    graphs = {name: _captured(run).replay for name, run in runs.items()}

    def take(name: K) -> dict[str, float]:
        return {"graph": measure(graphs[name], device, IN_A_GRAPH, queued=True)[0]}

    return {
        name: statistics.median(times["graph"])
        for name, times in alternate(graphs, take, repeats, device, warmup=2).items()
    }


def _captured(run: Run) -> torch.cuda.CUDAGraph:
    """`IN_A_GRAPH` calls. Each result's memory is the next one's, as it is without a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or loaded at a first call cannot be captured
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads (NCCL's watchdog) may ask CUDA for what a capture forbids.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(IN_A_GRAPH):
            run()
    return graph


def slowest_rank(values: Sequence[float], device: torch.device) -> list[float]:
    """For each repeat, the largest value of any rank."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a run needs at its peak beyond what was there before: torch's allocator on a GPU, the resident set on
    a CPU (None where it cannot be read)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _CLEAR_PEAK.write_text("5")
    except OSError:  # no Linux
        return None
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def measure_link(device: torch.device, repeats: int = 5) -> float:
    """GB/s that a rank sends to the others in a plain all_to_all_single of large equal blocks, of the slowest rank."""
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
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
