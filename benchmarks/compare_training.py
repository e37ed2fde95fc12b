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
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RunFacts: TypeAlias = dict[str, Any]  # of a run: its name, its rows and its summary, from JSON


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--caption", required=True, help="hardware, versions, commit and command, below the plot")
    options = parser.parse_args()
    runs = [_load(*run.split("=", 1)) for run in options.runs]

    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w") as file:
        file.write(json.dumps({"environment": True, "caption": options.caption}) + "\n")
        for run in runs:
            file.write(json.dumps({"run": run["name"], "summary": run["summary"]}) + "\n")
            for row in run["rows"]:
                file.write(json.dumps({"run": run["name"], **row}) + "\n")
    first = runs[0]
    for run in runs:
        warm = [row["seconds"] for row in run["rows"][len(run["rows"]) // 10 :]]
        difference = run["rows"][0]["loss"] - first["rows"][0]["loss"]
        held_out = run["summary"]["val_loss"]
        print(
            f"{run['name']:<28} first loss {run['rows'][0]['loss']:.6f} ({difference:+.1e})"
            f"   last {run['rows'][-1]['loss']:.4f}   held out {'-' if held_out is None else f'{held_out:.4f}'}"
            f"   median step {statistics.median(warm) * 1e3:.0f} ms"
        )
    _plot(runs, options.out, options.caption)


def _load(name: str, folder: str) -> RunFacts:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {"name": name, "rows": rows, "summary": json.loads((Path(folder) / "summary.json").read_text())}


def _plot(runs: list[RunFacts], out: Path, caption: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for run, style in zip(runs, itertools.cycle(("-", "--", ":", "-.")), strict=False):
        axes.plot([row["step"] for row in run["rows"]], [row["loss"] for row in run["rows"]], style, label=run["name"])
    axes.set(xlabel="step", ylabel="training loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.supxlabel(caption, fontsize="x-small", wrap=True)
    figure.savefig(out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
