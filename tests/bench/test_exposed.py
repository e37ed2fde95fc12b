"""The share of exposed communication, on traces written by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch

from megatron_ep_v2.bench.exposed import (
    Activity,
    Exposure,
    activity_of,
    computing,
    most_exposed,
    union,
    write_trace,
)
from tests.helpers.harness import run_ranks


def test_what_overlaps_with_compute_is_not_exposed() -> None:
    kernels = [
        ("void deep_ep::elastic::dispatch_impl<...>", (10.0, 30.0)),
        ("void deep_ep::elastic::combine_impl<...>", (25.0, 40.0)),  # on another stream
        ("gemm", (0.0, 12.0)),
        ("gemm", (20.0, 28.0)),
        ("silu", (22.0, 26.0)),  # two at a time cover no more
        ("gemm", (50.0, 60.0)),
        ("Memcpy DtoD", (10.0, 40.0)),  # hides nothing
    ]
    found = activity_of(kernels)
    assert (found.span, found.communication, found.exposed) == (60.0, 30.0, 20.0)
    found = activity_of(kernels[:2])
    assert (found.span, found.communication, found.exposed) == (30.0, 30.0, 30.0)


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
    found = activity_of(launches)
    assert (found.span, found.idle, found.computing, found.launches) == (65.0, 15.0, 35.0, 4)
    assert found.longest == {"gemm": 25.0, "silu": 20.0, "nccl": 15.0}
    assert activity_of([]) == Activity(0.0, 0.0, 0.0, 0.0, 0.0, 0, {})


def of_the_most_exposed(group: Any) -> Exposure:
    mine = [Activity(100.0, 0.0, 0.0, 50.0, 20.0, 3, {}), Activity(80.0, 0.0, 0.0, 30.0, 18.0, 3, {})]
    return most_exposed(mine[group.rank()], torch.device("cpu"))


def test_the_rank_with_the_largest_exposed_share_speaks_for_all() -> None:
    assert run_ranks(2, of_the_most_exposed) == [Exposure(80.0, 30.0, 18.0)] * 2
    assert Exposure(80.0, 30.0, 18.0).share == 0.225
    assert Exposure(0.0, 0.0, 0.0).share == 0.0


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
