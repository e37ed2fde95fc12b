"""What `benchmarks/` runs on: right results before times, cases in turn, the slowest rank; and a rehearsal of each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ep_v2.bench import check, timing
from megatron_ep_v2.bench.rows import timed
from tests.bench.test_bench import ROOT
from tests.helpers.commands import python
from tests.helpers.harness import run_ranks
from tests.helpers.stacks import on_one_stack

CPU = torch.device("cpu")


def wrong_on_one_rank(group: Any) -> str:
    right = {"output": torch.ones(4), "gradient": torch.full((2,), 2.0)}
    results = {"right": right, "wrong": right | {"gradient": torch.tensor([2.0, 2.0 + group.rank()])}}
    assert check.require_equal({"right": right}, right, 1e-6, CPU) == {"right": 0.0}
    with pytest.raises(check.WrongResultError) as error:
        check.require_equal(results, right, 1e-2, CPU)
    return str(error.value)


def test_a_wrong_case_raises_on_every_rank() -> None:
    first, second = run_ranks(2, wrong_on_one_rank)
    for text in (first, second):
        assert "WRONG RESULT, not timed: wrong\n" in text and "wrong: relative L2 3.5e-01" in text
    assert "gradient 0.0e+00" in first and "gradient 3.5e-01" in second


def test_what_cannot_be_compared_is_wrong() -> None:
    zeros = torch.zeros(3)
    assert check.relative_l2(zeros, zeros) == 0 and check.relative_l2(torch.ones(3), zeros) == math.inf
    assert check.relative_l2(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf


def rounds_in_turn(group: Any) -> tuple[list[str], dict[str, Any], list[str]]:
    order: list[str] = []

    def take(case: str) -> dict[str, float]:
        order.append(case)
        return {"alone": 10.0 * len(order) + group.rank()}

    times = timing.alternate(["a", "b"], take, 2, CPU, warmup=1, swap=True)
    halves: list[str] = []

    class Layer:
        def forward(self) -> str:
            halves.append("forward")
            return "state"

        def backward(self, states: list[str]) -> None:
            halves.append(f"backward of {len(states)}")

    timing.time_runs({"layer": Layer()}, 1, CPU, {"in_a_row": 3}, warmup=0)
    return order, times, halves


def test_cases_take_turns_and_the_slowest_rank_counts() -> None:
    for order, times, halves in run_ranks(2, rounds_in_turn):
        assert order == ["b", "a", "a", "b", "b", "a"]  # the first two warm up
        assert times == {"a": {"alone": [31.0, 61.0]}, "b": {"alone": [41.0, 51.0]}}
        assert halves == ["forward"] * 3 + ["backward of 3"]
    row = timed({"alone": [1.0, 2.0, 3.0, 4.0]}, {"alone": [5.0] * 4})
    assert row == {"alone_us": 2.5, "alone_p20_us": 1.0, "alone_p80_us": 4.0, "alone_ratio": 0.5}


REHEARSALS = {
    "gpu_deterministic.py": {"compact", "expanded"},
    "gpu_fp8.py": {"call", "wire", "layer", "kernel", "projection"},
    "gpu_layer_cost.py": {"four raw calls", "fused"},
    "gpu_layouts.py": {"kernel", "layer"},
    "gpu_recompute.py": {"no recompute", "recompute", "recompute, replayed"},
    "gpu_soak.py": {5, 10, 15, 20},
    "gpu_sync_free.py": {"layer, forward + backward", "decode: prepare, places, finalize"},
}
NAMED_BY = ("kind", "what", "step", "variant", "layout")


@pytest.mark.slow
@on_one_stack
@pytest.mark.parametrize("script", REHEARSALS)
def test_a_rehearsal_on_the_cpu(script: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = python(f"benchmarks/{script}", "--cpu", "--out", str(out), ranks=2, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    header, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert (header, rows) == (answer["environment"], answer["rows"])
    assert header["command"].startswith(f"torchrun --nproc-per-node 2 benchmarks/{script} --cpu")
    named_by = next(name for name in NAMED_BY if name in rows[0])
    assert {row[named_by] for row in rows} == REHEARSALS[script]


def test_a_script_that_measures_gpus_says_so_without_them() -> None:
    done = python("benchmarks/gpu_layer_cost.py", cwd=ROOT)
    assert done.returncode == 2 and "this benchmark measures GPUs" in done.stderr and "--cpu" in done.stderr
