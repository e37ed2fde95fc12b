"""The example with two processes and small runs: resumed after a signal, its data and its figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ep_v2.balance.what_if import recorded
from tests.helpers.commands import python
from tests.helpers.harness import HANG
from tests.helpers.paths import JOBS, ROOT

SCRIPT = ROOT / "examples" / "pretrain_qwen3_moe.py"
SMALL = ["--num-layers", "1", "--num-experts", "8", "--seq-length", "32", "--global-batch-size", "8"]
SMALL += ["--max-data-mb", "1", "--eval-samples", "4", "--log-every", "1", "--device", "cpu"]


def train(
    folder: Path, *arguments: str, first: Callable[[], None] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    out = ["--out", str(folder / "out")]
    return python(str(SCRIPT), *SMALL, *out, *arguments, ranks=2, first=first, **variables)


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def losses(folder: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def stop_later() -> None:
    """On the second rank: a signal in step STOP_IN."""
    from qwen3_moe import loop

    theirs = loop.train_batches

    def train_batches(samples: Any, options: Any, step: int, rank: int, world: int) -> Any:
        if rank == 1 and step + 1 == int(os.environ["STOP_IN"]):
            signal.raise_signal(signal.SIGTERM)
        return theirs(samples, options, step, rank, world)

    loop.train_batches = train_batches


@pytest.mark.slow
def test_a_resumed_run_continues_exactly(tmp_path: Path) -> None:
    """After a signal to torchrun, and after a signal to one rank; the one run here that torchrun starts."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = ["--steps", "100000", "--record-load", "2"]  # more than there is time for
    save = [*steps, "--save", str(parts / "save"), "--save-interval", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    waits, wait_in_step = tmp_path / "waits", JOBS / "wait_in_step.py"
    torchrun += ["--nproc-per-node", "2", str(wait_in_step), "3", str(waits)]
    torchrun += [str(SCRIPT), *SMALL, "--out", str(parts / "out"), *save]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(torchrun, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + HANG
        while not waits.exists():
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # torchrun hands it on
        waits.unlink()
        process.wait(HANG)
    finally:
        process.kill()
    stopped_at = losses(parts)[-1][0]
    last = stopped_at + 3

    resumed = summary(train(parts, *save, "--resume", first=stop_later, STOP_IN=str(last)))
    result = summary(train(whole, *steps, first=stop_later, STOP_IN=str(last)))
    assert losses(parts) == losses(whole), f"stopped after step {stopped_at}"
    recordings = [(folder / "out" / "expert_load.jsonl").read_text() for folder in (parts, whole)]
    assert recordings[0] == recordings[1] and len(recordings[0].splitlines()) == last // 2
    assert resumed["steps"] == result["steps"] == len(losses(whole)) == last
    assert result["stopped_by"] == "a signal to another rank" and result["status"]["buffer"] == "reference"
    assert (whole / "out" / "loss.png").stat().st_size > 0 and (whole / "out" / "loss.svg").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["missing", "binary", "unreadable", "too little"])
def test_data_that_cannot_be_used(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if kind == "binary":
        path.write_bytes(bytes(range(256)) * 100)
    elif kind == "unreadable":
        if os.geteuid() == 0:
            path.mkdir()  # root may read every file: a folder where a file should be, with a broken link in it
            (path / "gone.txt").symlink_to(tmp_path / "nowhere")
        else:
            path.write_text("text")
            path.chmod(0)
    elif kind == "too little":
        path.write_text("a word")
    done = train(tmp_path, "--steps", "2", "--data", str(path))
    assert done.returncode != 0
    assert str(path) in done.stderr and "\n  fix: " in done.stderr
    assert done.stderr.count("\n  fix: ") == 1, "said once, not by every rank"


@pytest.mark.slow
def test_megatrons_own_data_files(tmp_path: Path) -> None:
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path / "corpus"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        builder.add_document(torch.randint(300, (200,), generator=generator), [200])
    builder.finalize(f"{prefix}.idx")
    result = summary(train(tmp_path, "--steps", "2", "--data-path", str(prefix), "--vocab-size", "300"))
    assert result["steps"] == 2 and 0 < result["val_loss"] < 10
    assert result["status"]["settings"]["reference_strict"] == "True (default)", "it must run as on GPUs"


def keep_one_apart() -> None:
    """Read the counts after each micro-batch, as a step of more micro-batches than are kept apart does."""
    from megatron_ep_v2.megatron.qwen3_moe import trainer

    trainer.DISPATCHES = 1


@pytest.mark.slow
def test_both_dispatchers_report_the_same_load(tmp_path: Path) -> None:
    """Counted by what is dispatched, and by what the router says; the first step of both is the same one."""
    found = []
    for dispatcher, first in (("flex", None), ("alltoall", None), ("flex", keep_one_apart)):
        arguments = ["--micro-batch-size", "2", "--num-layers", "2", "--record-load", "1"]
        done = train(tmp_path, "--steps", "1", "--dispatcher", dispatcher, *arguments, first=first)
        row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
        assert summary(done)["overload_mean"] == pytest.approx(row["overload_mean"], abs=1e-4)
        assert f"rank {row['overload_mean']:.2f}x" in done.stderr
        loads = recorded(tmp_path / "out" / "expert_load.jsonl")  # of two micro-batches, two layers, two ranks
        assert loads.shape == (2, 2, 2, 4) and loads.sum(dim=(2, 3)).eq(2 * 2 * 32 * 4).all(), "each selection once"
        busiest = loads.sum(dim=3).amax(dim=2) / (2 * 32 * 4)
        assert row["overload_mean"] == pytest.approx(busiest.mean().item())
        assert row["overload_max"] == pytest.approx(busiest.max().item())
        per_expert = loads.sum(dim=0).flatten(1).double()
        assert row["expert_balance"] == pytest.approx((per_expert.amax(1) / per_expert.mean(1)).mean().item())
        found.append(loads)
    flex, alltoall, one_apart = found
    assert flex[0].equal(alltoall[0]) and flex.equal(one_apart) and not flex[0].equal(flex[1])


def test_a_run_that_an_older_version_began_is_reported(tmp_path: Path) -> None:
    """Its first steps have no overload in metrics.jsonl."""
    from qwen3_moe import report

    names = ("step", "tokens", "loss", "tokens_per_second", "expert_balance")
    old, new = (dict.fromkeys(names, step) for step in (1, 2))
    new |= {"overload_mean": 1.5, "overload_max": 2.0}
    options, runtime, samples = (mock.Mock() for _ in range(3))
    samples.unigram_entropy = 3.0
    for rows, expected in (([old], None), ([old, new], 1.5)):
        assert report.summary(options, runtime, samples, rows, None, None)["overload_mean"] == expected
        assert all(path.stat().st_size for path in report.plot(rows, 3.0, tmp_path, "run"))
