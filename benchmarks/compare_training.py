"""Put the runs of `examples/pretrain_qwen3_moe.py` next to each other: one results file, one plot of their losses.

    python benchmarks/compare_training.py NAME=RUN_DIR NAME=RUN_DIR ... --caption "8 x H200, ..." --out OUT.jsonl

The others are compared with the first run. Prints the first step's losses, their differences, the last losses, those
on held-out text, and median step times (the first tenth of the steps left out); writes the rows and, next to them, the
plot as SVG.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "megatron_ep_v2"  # the same rows give the same file

RunFacts: TypeAlias = dict[str, Any]  # of a run: its name, its rows and its summary, from JSON
# Field of a row -> what its panel says.
PANELS = {
    "loss": "training loss, nats per byte",
    "overload_mean": "overload of ranks,\nmean of layers",
    "seconds": "seconds a step",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--caption", required=True, help="hardware, versions, commit and command, below the plot")
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=["loss"], help="default: loss")
    options = parser.parse_args()
    runs = [load(name, Path(folder)) for name, folder in (run.split("=", 1) for run in options.runs)]
    write_rows(options.out, {"environment": True, "caption": options.caption}, runs)
    print("\n".join(said(runs)))
    plot(runs, options.out, options.caption, options.panels)


def load(name: str, folder: Path) -> RunFacts:
    """A run by its folder, `--out` of the example."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"name": name, "rows": rows, "summary": json.loads((folder / "summary.json").read_text())}


def write_rows(out: Path, header: Mapping[str, object], runs: Sequence[RunFacts]) -> None:
    """The header, then of each run its summary and its steps."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        file.write(json.dumps(header) + "\n")
        for run in runs:
            file.write(json.dumps({"run": run["name"], "summary": run["summary"]}) + "\n")
            for row in run["rows"]:
                file.write(json.dumps({"run": run["name"], **row}) + "\n")


def said(runs: Sequence[RunFacts]) -> list[str]:
    """A line for each run, compared with the first one."""
    first, lines = runs[0], []
    for run in runs:
        warm = run["rows"][len(run["rows"]) // 10 :]
        difference = run["rows"][0]["loss"] - first["rows"][0]["loss"]
        held_out = run["summary"]["val_loss"]
        line = (
            f"{run['name']:<28} first loss {run['rows'][0]['loss']:.6f} ({difference:+.1e})"
            f"   last {run['rows'][-1]['loss']:.4f}   held out {'-' if held_out is None else f'{held_out:.4f}'}"
            f"   median step {statistics.median(row['seconds'] for row in warm) * 1e3:.0f} ms"
        )
        if "overload_mean" in warm[0]:
            line += f"   mean overload {statistics.fmean(row['overload_mean'] for row in warm):.3f}"
        lines.append(line)
    return lines


def plot(runs: Sequence[RunFacts], out: Path, caption: str, panels: Sequence[str]) -> None:
    """An SVG next to the rows: a panel for each field of `PANELS`, one above the other."""
    height = 4.2 if len(panels) == 1 else 1.2 + 2.1 * len(panels)
    figure, grid = plt.subplots(len(panels), figsize=(7, height), sharex=True, squeeze=False, layout="constrained")
    for axes, name in zip(grid.flat, panels, strict=True):
        for run, style in zip(runs, itertools.cycle(("-", "--", ":", "-.")), strict=False):
            axes.plot(
                [row["step"] for row in run["rows"]], [row[name] for row in run["rows"]], style, label=run["name"]
            )
        axes.set(ylabel=PANELS[name])
        axes.grid(alpha=0.3)
    grid.flat[0].legend()
    grid.flat[-1].set(xlabel="step")
    figure.supxlabel(caption, fontsize="x-small", wrap=True)
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
