"""`doctor --ranks N`: real processes through Megatron's dispatcher; and ranks that fail, die, hang or miscalculate."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_ep_v2
from megatron_ep_v2.doctor import trial
from tests.helpers.harness import HANG, run_ranks
from tests.helpers.paths import ROOT
from tests.helpers.stacks import on_one_stack


@pytest.mark.slow
def test_the_real_command(tmp_path: Path) -> None:
    """Everything real: this machine without its GPUs, its torch and Megatron, two processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_ep_v2", "doctor", "--json", "--ranks", "2"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    checks = {check["name"]: check for check in document["checks"]}
    assert document["usable"] == "reference buffer on gloo (CPU), expanded layout"
    assert {check["status"] for check in checks.values()} <= {"ok", "skip"}
    assert checks["torch"]["found"] == torch.__version__
    assert checks["megatron-core"]["found"].endswith(", symbols found, not patched")
    assert "2 ranks, reference buffer, expanded, torch.float32" in checks["trial"]["found"]
    for rank in ("0", "1"):
        errors = document["facts"]["trial"][rank]["errors"]
        assert len(errors) == 3 and all(0 < error < 1e-5 for error in errors.values())


# ------------------------------------------------------------------------------------------- ranks that do not finish

# Runs first in every process; `what` in the one that is rank 1.
SITE = """
import os, signal, sys, time
called = sys.orig_argv
if "megatron_ep_v2.doctor.trial" in called and called[called.index("megatron_ep_v2.doctor.trial") + 1] == "1":
    {what}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run_trial(2)` on the CPU, with something wrong on rank 1, and its limits from the moment when rank 0 waits."""
    wait = trial._wait

    def wait_later(processes: list[Any]) -> list[int]:
        store = Path(processes[0].args[-1], "store")  # made by the first rank that joins the process group
        while not store.exists() and processes[0].poll() is None:
            time.sleep(0.05)
        return wait(processes)

    def run(what: str, **limits: float) -> Any:
        (tmp_path / "sitecustomize.py").write_text(SITE.format(what=what))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(trial, "_wait", wait_later)
        for name, seconds in limits.items():
            monkeypatch.setattr(trial, name, seconds)
        return trial.run_trial(2)

    return run


@pytest.mark.slow
@on_one_stack
def test_a_rank_that_raises(run: Any) -> None:
    check, found = run("os.environ['MCORE_DEEPEP_V2_LAYOUT'] = 'sorted'")
    assert (check.name, check.status) == ("trial", "fail")
    assert "rank 1: megatron_ep_v2.errors.SettingsError: the setting layout" in check.found
    assert "Traceback" in found["1"]["stderr"] and "run_rank" in found["1"]["stderr"]
    assert "rank 0: " in check.found and "stderr" in found["0"], "what it made of its peer's end"


@pytest.mark.slow
@on_one_stack
def test_a_rank_that_dies_and_one_that_waits_for_it(run: Any) -> None:
    check, found = run("os.kill(os.getpid(), signal.SIGSEGV)", GRACE_SECONDS=2)
    assert check.status == "fail"
    assert "rank 0: stuck, see its stack; rank 1: killed the process (SIGSEGV)" in check.found
    assert "most recent call first" in found["0"]["stderr"] and "in run_rank" in found["0"]["stderr"]


@pytest.mark.slow
@on_one_stack
def test_a_rank_that_never_comes(run: Any) -> None:
    check, found = run("time.sleep(3600)", SECONDS=2)
    assert check.status == "fail"
    assert "rank 0: stuck, see its stack; rank 1: stuck" in check.found
    assert "in run_rank" in found["0"]["stderr"]


# -------------------------------------------------------------------------------------------- ranks that miscalculate


def half_of_its_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The same values."""
    return 0.5 * tensor + 0.5 * tensor.detach()


def compare(group: Any, layout: str, fault: str) -> dict[str, float]:
    """Runs in every rank."""
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_ep_v2.megatron import managers

    megatron_ep_v2.install(buffer="reference", layout=layout)
    module = managers if layout == "expanded" else token_dispatcher
    dispatch, combine = module.fused_dispatch, token_dispatcher.fused_combine

    def broken_dispatch(x: Any, indices: Any, probs: Any, *arguments: Any, **options: Any) -> Any:
        x = half_of_its_gradient(x) if fault == "half the gradient of x" else x
        probs = half_of_its_gradient(probs) if fault == "half the gradient of the probabilities" else probs
        return dispatch(x, indices, probs, *arguments, **options)

    def broken_combine(x: Any, *arguments: Any, **options: Any) -> Any:
        return combine(x.flip(0) if fault == "rows in a wrong order" else x, *arguments, **options)

    module.fused_dispatch, token_dispatcher.fused_combine = broken_dispatch, broken_combine
    try:
        with torch.compiler.set_stance("force_eager"):
            return trial._compare(group.rank(), group.size(), torch.device("cpu"), torch.float32)
    finally:
        module.fused_dispatch, token_dispatcher.fused_combine = dispatch, combine
        megatron_ep_v2.uninstall()


@pytest.mark.parametrize("layout", ["expanded", "compact"])
@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("nothing", set()),
        ("rows in a wrong order", {"output", "gradient of x", "gradient of the probabilities"}),
        ("half the gradient of x", {"gradient of x"}),
        ("half the gradient of the probabilities", {"gradient of the probabilities"}),
    ],
)
def test_the_comparison(fault: str, wrong: set[str], layout: str) -> None:
    for errors in run_ranks(2, compare, layout, fault):
        assert {name for name, error in errors.items() if not error <= 1e-5} == wrong
        assert all(error > 0.1 for name, error in errors.items() if name in wrong)


def test_an_error_that_is_too_large_fails() -> None:
    found = {"buffer": "elastic", "layout": "expanded", "dtype": "torch.bfloat16", "tolerance": 2e-2}
    small, large = {"output": 0.004, "gradient of x": 0.004}, {"output": 0.004, "gradient of x": 0.5}
    assert trial._judge({"0": {**found, "errors": small}, "1": {**found, "errors": small}}, {}).status == "ok"
    check = trial._judge({"0": {**found, "errors": small}, "1": {**found, "errors": large}}, {})
    assert check.status == "fail" and "relative error 5e-01" in check.found and check.needed and check.fix
    check = trial._judge({"0": {**found, "errors": {"output": 0.004, "gradient of x": math.nan}}}, {})
    assert check.status == "fail" and "relative error nan" in check.found
