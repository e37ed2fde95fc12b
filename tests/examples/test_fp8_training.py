"""The example with 8-bit rows and gradients trains as it does without."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.examples.test_example import losses, summary, train

STEPS = 30


@pytest.mark.slow
def test_losses_stay_together(tmp_path: Path) -> None:
    curves = {}
    for dtype in ("bf16", "fp8"):
        folder = tmp_path / dtype
        arguments = ["--steps", str(STEPS), "--dispatch-dtype", dtype, "--grad-dispatch-dtype", dtype]
        [buffer] = summary(train(folder, *arguments))["status"]["buffers"]
        assert buffer["dispatch_dtype"] == buffer["grad_dispatch_dtype"] == f"{dtype} (install())"
        curves[dtype] = [loss for _, loss, _ in losses(folder)]
    plain, rough = curves["bf16"], curves["fp8"]
    assert plain[0] != rough[0], "rows were rounded"
    assert abs(plain[0] - rough[0]) < 1e-3, "by little"
    last = [statistics.fmean(curve[-10:]) for curve in (plain, rough)]
    assert last[0] < plain[0] - 2.0, "nothing was learned"
    assert abs(last[0] - last[1]) < 0.05, last
