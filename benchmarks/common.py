"""What the scripts here share: the bench's environment header and results file, times, and one flex dispatcher."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep_v2.bench import report, timing
from megatron_ep_v2.bench.variants import Variant, make_dispatchers


def environment(script: str) -> dict[str, Any]:
    """Hardware, versions, commit and command: the first row of every results file."""
    return report.environment(" ".join([script, *sys.argv[1:]]))


def torchrun(script: str) -> str:
    """The command of this job."""
    return f"torchrun --nproc-per-node {dist.get_world_size()} benchmarks/{script}"


def write_rows(path: Path | None, header: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """A JSONL file, header first; and one JSON document as the last line on stdout."""
    if path:
        report.write_rows(path, header, rows)
    print(json.dumps({"environment": header, "rows": list(rows)}))


class Results:
    """A torchrun job's rows, printed and kept on rank 0. The file is rewritten with each group of them, so that a run
    that is cut off leaves what it has; the header says `"complete": false` until the end."""

    def __init__(self, path: Path | None, script: str):
        self.path, self.rows = path, list[dict[str, Any]]()
        self.header = environment(torchrun(script)) if dist.get_rank() == 0 else None

    def add(self, rows: Sequence[dict[str, Any]], line: Callable[[dict[str, Any]], str] | None = None) -> None:
        """line: a row as it is printed; None = its names and values."""
        self.rows += rows
        if self.header is None:
            return
        for row in rows:
            print(line(row) if line else "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if self.path:
            report.write_rows(self.path, self.header | {"complete": False}, self.rows)

    def finish(self) -> None:
        """See `write_rows`."""
        if self.header is not None:
            write_rows(self.path, self.header, self.rows)


def start(on_cpu: bool) -> torch.device:
    """The process group of a torchrun job, with a limit on every wait, and this rank's device."""
    limit = datetime.timedelta(seconds=90)
    if on_cpu:
        dist.init_process_group("gloo", timeout=limit)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=limit)
    return device


def time_layers(
    variants: Mapping[Any, Callable[[], Any]], repeats: int, device: torch.device, warmup: int = 3
) -> dict[Any, list[float]]:
    """Variant -> microseconds of each repeat, of the slowest rank. They alternate; each begins on an idle device."""
    times: dict[Any, list[float]] = {name: [] for name in variants}
    for repeat in range(-warmup, repeats):
        for name, run in variants.items():
            microseconds, _ = timing.measure(run, device)
            if repeat >= 0:
                times[name].append(microseconds)
    return {name: timing.slowest_rank(values, device) for name, values in times.items()}


IN_A_GRAPH = 20  # calls
AHEAD_CYCLES = 2_000_000  # about 1 ms of the device


def graph_times(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Microseconds of one call on the device, without what the host takes to launch it: a CUDA graph of `IN_A_GRAPH`
    calls is replayed between two events, the time divided. Medians over repeats, of the slowest rank; runs alternate.

    The device is kept busy until the events and the graph are queued, so no launch falls between them. What is left of
    launches is the gap between a graph's kernels, about 1 us each. Inputs that fit in the L2 cache are read from there.

    Args:
        runs: They may not wait for the device, nor go through autograd's backward, which has streams of its own.
    """
    graphs = {name: _captured(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-2, repeats):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            torch.cuda._sleep(AHEAD_CYCLES)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 0:
                times[name].append(start.elapsed_time(end) * 1e3 / IN_A_GRAPH)
    device = torch.device("cuda", torch.cuda.current_device())
    slowest = timing.slowest_rank([statistics.median(values) for values in times.values()], device)
    return dict(zip(times, slowest, strict=True))


def _captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """`IN_A_GRAPH` calls. Each result's memory is the next one's, as it is without a graph."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # what is compiled or loaded at a first call cannot be captured
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # Other threads (NCCL's watchdog) may ask CUDA for what a capture forbids.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(IN_A_GRAPH):
            run()
    return graph


def make_flex_dispatcher(*, hidden: int, experts: int, topk: int) -> Any:
    """Megatron's flex token dispatcher over the whole world, outside any model, as `install()` has set it up."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    (dispatcher,), _ = make_dispatchers(
        Variant("flex", "flex"),
        1,
        dist.group.WORLD,
        alone,
        hidden=hidden,
        experts=experts,
        topk=topk,
        dtype=torch.bfloat16,
    )
    return dispatcher
