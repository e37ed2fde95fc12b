"""The example with each kind of experts: the same losses, checkpoints that resume, and errors said once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.examples.test_example import losses, summary, train


@pytest.mark.slow
def test_all_experts_learn_the_same(tmp_path: Path) -> None:
    """From the same initial weights. A checkpoint of stacked experts is not one of Megatron's, and both say so."""
    found = {}
    for experts in ("megatron", "grouped", "sequential"):
        folder = tmp_path / experts
        save = ["--save", str(folder / "save"), "--save-interval", "2"]
        summary(train(folder, "--steps", "4", "--experts", experts, "--dtype", "fp32", *save))
        found[experts] = losses(folder)
    for experts in ("grouped", "sequential"):
        for (_, ours, norm), (_, theirs, their_norm) in zip(found[experts], found["megatron"], strict=True):
            assert abs(ours - theirs) < 1e-4 * theirs and abs(norm - their_norm) < 1e-3 * their_norm

    folder = tmp_path / "grouped"
    save = ["--save", str(folder / "save"), "--resume"]
    assert summary(train(folder, "--steps", "6", "--experts", "grouped", *save))["steps"] == 6
    refused = train(folder, "--steps", "8", *save)
    assert refused.returncode != 0
    assert "does not fit the checkpoint" in refused.stderr and "experts stacked" in refused.stderr
    refused = train(tmp_path / "megatron", "--steps", "8", "--experts", "grouped",
                    "--save", str(tmp_path / "megatron" / "save"), "--resume")  # fmt: skip
    assert refused.returncode != 0 and "experts one by one" in refused.stderr


@pytest.mark.slow
def test_redundant_experts_learn_the_same_with_less_overload(tmp_path: Path) -> None:
    found, overloads = {}, {}
    for slots in ("0", "2"):
        more = ["--redundant-experts", slots, "--balance-min-rows", "1", "--record-load", "1"]
        folder = tmp_path / slots
        summary(train(folder, "--steps", "4", "--experts", "grouped", "--dtype", "fp32", *more))
        found[slots] = losses(folder)
        rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
        overloads[slots] = [row["overload_mean"] for row in rows]
    for (_, ours, norm), (_, theirs, their_norm) in zip(found["2"], found["0"], strict=True):
        # A replica's gradient is a small part of the norm: if it gets lost, that changes by some 1e-4.
        assert abs(ours - theirs) < 1e-6 * theirs and abs(norm - their_norm) < 1e-6 * their_norm
    assert max(overloads["2"]) < 1.1 < max(overloads["0"])
    # What is recorded for what-if is what the router said, before replicas; the first step's routing is that of R = 0.
    first = [(tmp_path / slots / "out" / "expert_load.jsonl").read_text().splitlines()[0] for slots in ("0", "2")]
    assert first[0] == first[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--experts", "deepgemm"], "DeepGEMM multiplies on GPUs only"),
        (
            ["--experts", "grouped", "--hidden-size", "66", "--num-attention-heads", "2", "--dtype", "fp32"],
            "grouped GEMM does not take",
        ),
        (["--redundant-experts", "1"], "--experts grouped or sequential"),
    ],
)
def test_experts_that_cannot_run_here(options: list[str], message: str, tmp_path: Path) -> None:
    done = train(tmp_path, "--steps", "2", *options)
    assert done.returncode != 0 and message in done.stderr and "sequential" in done.stderr
