"""The example trained sync-free: the same losses, also where the first steps have to be repeated with more room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.test_example import losses, summary, train

STEPS = ["--steps", "6", "--experts", "grouped", "--dtype", "fp32"]
TOLERANCE = 2e-4  # of fp32 losses after six steps; sums are in another order


@pytest.mark.slow
def test_steps_without_room_are_repeated_and_losses_stay_the_same(tmp_path: Path) -> None:
    expanded, sync_free = tmp_path / "expanded", tmp_path / "sync-free"
    assert summary(train(expanded, *STEPS))["status"]["layout"] == "expanded"

    done = train(sync_free, *STEPS, "--sync-free", MCORE_DEEPEP_V2_SYNC_FREE_ROWS_PERCENT="50")
    result = summary(done)
    assert result["status"]["layout"] == "sync-free"
    assert "the reference buffer is not strict in this run: DeepEP would refuse rows in fp32" in done.stderr
    assert "after step 0: " in done.stderr and "again with room for" in done.stderr, done.stderr[-2000:]
    assert "after step 5: room for" in done.stderr  # and step 6 runs in it
    ours, theirs = losses(sync_free), losses(expanded)
    assert [step for step, _, _ in ours] == [step for step, _, _ in theirs] == [1, 2, 3, 4, 5, 6]
    for (step, loss, norm), (_, loss_too, norm_too) in zip(ours, theirs, strict=True):
        assert abs(loss - loss_too) < TOLERANCE and abs(norm / norm_too - 1) < 1e-2, f"step {step}"


def test_it_says_which_experts_it_needs(tmp_path: Path) -> None:
    done = train(tmp_path, "--steps", "1", "--sync-free")
    assert done.returncode != 0 and "--experts grouped" in done.stderr


def test_it_says_what_a_graph_needs(tmp_path: Path) -> None:
    done = train(tmp_path, "--steps", "1", "--sync-free", "--experts", "grouped", "--cuda-graph")
    assert done.returncode != 0
    assert "found: cpu, --sync-free" in done.stderr and "fix: --cuda-graph --sync-free --experts grouped" in done.stderr


def test_it_says_what_record_load_takes(tmp_path: Path) -> None:
    done = train(tmp_path, "--steps", "1", "--record-load", "-1")
    assert done.returncode != 0 and "found: --record-load -1" in done.stderr
