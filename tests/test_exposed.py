"""The share of exposed communication, on traces written by hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from exposed import Share, share, union


def test_what_runs_beside_compute_is_not_exposed() -> None:
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


def test_intervals_that_touch_are_one() -> None:
    assert union([(3, 4), (1, 2), (2, 3), (6, 7), (1, 1.5)]) == [(1, 4), (6, 7)]
