"""The share of exposed communication, on traces written by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from megatron_ep_v2.bench.exposed import Activity, Share, activity_of, computing, share, union, write_trace


def test_what_overlaps_with_compute_is_not_exposed() -> None:
    kernels = [
        ("void deep_ep::elastic::dispatch_impl<...>", (10.0, 30.0)),
        ("void deep_ep::elastic::combine_impl<...>", (25.0, 40.0)),  # on another stream
        ("gemm", (0.0, 12.0)),
        ("gemm", (20.0, 28.0)),
        ("silu", (22.0, 26.0)),  # two at a time cover no more
        ("gemm", (50.0, 60.0)),
    ]
    assert share(kernels) == Share(step=60.0, communication=30.0, exposed=20.0)
    assert share(kernels[:2]) == Share(step=30.0, communication=30.0, exposed=30.0)
    assert share([]) == Share(step=0.0, communication=0.0, exposed=0.0)


def test_a_kernel_that_waits_for_another_rank_computes_nothing() -> None:
    kernels = [
        ("ncclDevKernel_AllReduce_Sum_f32", (0.0, 90.0)),
        ("void deep_ep::elastic::dispatch_impl<...>", (5.0, 80.0)),
        ("gemm", (10.0, 30.0)),
        ("Memcpy DtoD", (25.0, 40.0)),
        ("silu", (85.0, 90.0)),
    ]
    assert computing(kernels) == 35.0


def test_a_gpu_is_idle_between_its_launches() -> None:
    launches = [("gemm", (10.0, 30.0)), ("silu", (20.0, 40.0)), ("nccl", (45.0, 60.0)), ("gemm", (70.0, 75.0))]
    assert activity_of(launches) == Activity(
        span=65.0, idle=15.0, computing=35.0, launches=4, longest={"gemm": 25.0, "silu": 20.0, "nccl": 15.0}
    )
    assert activity_of([]) == Activity(span=0.0, idle=0.0, computing=0.0, launches=0, longest={})


def test_intervals_that_touch_are_one() -> None:
    assert union([(3, 4), (1, 2), (2, 3), (6, 7), (1, 1.5)]) == [(1, 4), (6, 7)]


def test_a_trace_has_each_kernel_on_the_line_of_its_stream(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "trace.json.gz"
    write_trace(file, [("gemm", 7, 130.04, 150.0), ("dispatch" + "<x>" * 99, 22, 100.0, 140.5)])
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert [(e["tid"], e["args"]["name"]) for e in events if e["ph"] == "M"] == [(7, "stream 7"), (22, "stream 22")]
    kernels = [(e["name"][:8], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert kernels == [("dispatch", 22, 0.0, 40.5), ("gemm", 7, 30.0, 20.0)]
    assert max(len(e["name"]) for e in events) == 100
