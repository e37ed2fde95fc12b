"""`benchmarks/plot.py`: pictures from rows, all of what was measured and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import plot
import pytest

from tests.bench.test_bench import ROOT
from tests.helpers.harness import HANG

HEADER = {"environment": True, "gpu": "8 x Some GPU", "torch": "2.99", "commit": "abc1234", "command": "python -m x"}
COMMON = {"status": "ok", "shape": "small", "hidden": 64, "experts": 8, "topk": 3, "dtype": "bf16", "ranks": 8}


def layer(variant: str, us: float, sms: int | None = None, tokens: int = 4096, noise: str = "") -> dict[str, Any]:
    times = {"forward_us": us / 3, "forward_backward_us": us, "forward_backward_p20_us": us - 5}
    times |= {"forward_backward_p80_us": us + 5, "gb_per_s": 1e5 / us, "link_gb_per_s": 321.0}
    about = {"variant": variant, "buffer": None, "num_sms": sms, "tokens_per_rank": tokens, "routing": "balanced"}
    return COMMON | about | times | {"noise": noise}


def step(variant: str, ms: float, sms: int | None = None) -> dict[str, Any]:
    about = {"variant": variant, "num_sms": sms, "layers": 4, "tokens_per_rank": 4096, "micro_batches": 2}
    return COMMON | about | {"step_ms": ms, "dispatch_percent": 20.0, "combine_percent": 10.0, "noise": ""}


def write(path: Path, rows: list[dict[str, Any]], **more: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in [HEADER | more, *rows]))
    return path


@pytest.mark.slow
def test_every_picture_from_the_rows_of_two_environments(tmp_path: Path) -> None:
    unavailable = {"status": "unavailable", "variant": "hybridep", "reason": "not here"}
    first = [layer("alltoall", 500.0), layer("alltoall", 900.0, tokens=8192), unavailable]
    first += [layer("expanded", 200.0, sms=14), layer("expanded", 190.0, sms=32, noise="it varies")]
    first += [step("alltoall", 50.0), step("expanded", 41.0, sms=14), step("expanded", 40.0, sms=32)]
    files = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", [layer("hybridep", 210.0)], torch="3.1")]
    command = [sys.executable, str(ROOT / "benchmarks" / "plot.py"), *map(str, files), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {f"{name}.svg" for name in plot.PLOTS}
    assert {Path(line).name for line in done.stdout.splitlines()} == made
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in made)


def texts(axes: Any) -> set[str]:
    return {text.get_text() for text in axes.get_yticklabels()}


def test_bars_and_markers_are_the_rows_and_nothing_is_drawn_between() -> None:
    rows = [layer("expanded", us, sms=sms) | {"file": 0} for sms, us in ((14, 200.0), (24, 180.0), (32, 190.0))]
    rows += [layer("alltoall", 500.0) | {"file": 0}]

    def axes_of(name: str) -> Any:
        (axes,) = plot.make(plot.PLOTS[name], rows, ["caption"]).axes
        return axes

    axes = axes_of("times")
    assert texts(axes) == {"expanded, 14 SMs", "expanded, 24 SMs", "expanded, 32 SMs", "alltoall"}
    assert sorted({round(patch.get_width(), 6) for patch in axes.patches}) == pytest.approx(
        sorted({us / 1e3 / part for us in (200.0, 180.0, 190.0, 500.0) for part in (1, 3)}), rel=1e-5
    )
    axes = axes_of("sms")
    marked = [line for line in axes.lines if len(line.get_xdata()) and line.get_marker() != "None"]
    assert [list(line.get_xdata()) for line in marked] == [[14, 24, 32]]
    assert list(marked[0].get_ydata()) == pytest.approx([1e5 / us for us in (200.0, 180.0, 190.0)])
    assert all(line.get_linestyle() == "None" for line in marked)
    link = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in link] == [[321.0, 321.0]]
    assert all(plot.make(plot.PLOTS[name], rows, ["caption"]) is None for name in ("tokens", "step", "tune"))


def test_the_step_is_cut_where_its_shares_are() -> None:
    (axes,) = plot.make(plot.PLOTS["step"], [step("expanded", 40.0, sms=14) | {"file": 0}], ["caption"]).axes
    assert [(patch.get_x(), patch.get_width()) for patch in axes.patches] == [(0, 8), (8, 4), (12, 28)]


def test_steps_are_distinguished_by_their_experts() -> None:
    kinds = [
        step("expanded", ms) | {"file": 0, "expert_backend": kind} for kind, ms in (("megatron", 4.0), ("grouped", 2.0))
    ]
    for rows, names in (
        (kinds, ["expanded, megatron experts", "expanded, grouped experts"]),
        (kinds[:1], ["expanded"]),
    ):
        (axes,) = plot.make(plot.PLOTS["step"], rows, ["caption"]).axes
        assert [label.get_text() for label in axes.get_yticklabels()] == names


def test_the_caption_is_the_header(tmp_path: Path) -> None:
    rows, captions = plot.load([write(tmp_path / "rows.jsonl", [layer("alltoall", 1.0)])])
    assert [row["variant"] for row in rows] == ["alltoall"]
    assert captions == ["8 x Some GPU, torch 2.99, commit abc1234; python -m x"]
    figure = plot.make(plot.PLOTS["times"], rows, captions)
    assert figure.get_supxlabel() == captions[0]
    two = [*rows, layer("hybridep", 2.0) | {"file": 1}]
    figure = plot.make(plot.PLOTS["times"], two, [captions[0], "another machine"])
    assert texts(figure.axes[0]) == {"alltoall [1]", "hybridep [2]"}
    assert figure.get_supxlabel().splitlines()[-1] == "[2] another machine"
    (tmp_path / "other.jsonl").write_text('{"run": "x"}\n')
    with pytest.raises(SystemExit, match="no environment header"):
        plot.load([tmp_path / "other.jsonl"])
