"""Pictures of the rows of `python -m megatron_ep_v2 bench`: as many SVG files as the rows give.

    python benchmarks/plot.py benchmarks/results/h200x8/bench.jsonl ... --out benchmarks/results/h200x8/plots

    times.svg   forward and backward of each dispatcher, a panel for each shape and routing
    sms.svg     bandwidth against SMs, with the link measured in the same run as a line
    tokens.svg  time against tokens per rank
    step.svg    a whole training step: dispatch, combine and the rest
    tune.svg    a whole training step against SMs

What was measured is a bar or a marker; nothing is drawn between markers. Whiskers are the 20th and 80th percentile, a
hatched bar or a hollow marker is a row that the bench called noisy. Hardware, versions and command, from the files'
headers, stand below each picture. Several files (environments that exclude each other) go into one picture, numbered.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams["svg.hashsalt"] = "megatron_ep_v2"  # the same rows give the same file

Row = dict[str, Any]
_MARKERS = "osD^v<>Pph*X"
_CHARACTERS_AN_INCH = 17  # of the caption


@dataclass(frozen=True)
class Plot:
    """One kind of picture: which rows it shows, by which panels they are distinguished, how a panel is drawn, and what
    its numbers are."""

    select: Callable[[list[Row]], list[Row]]
    panel: Callable[[Row], str]
    draw: Callable[[Axes, list[Row]], None]
    title: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=list(PLOTS), help="default: all that the rows give")
    options = parser.parse_args()
    rows, captions = load(options.files)
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name in options.only or PLOTS:
        figure = make(PLOTS[name], rows, captions)
        if figure is not None:
            file = options.out / f"{name}.svg"
            figure.savefig(file, metadata={"Date": None})
            drawn.append(str(file))
    if not drawn:
        raise SystemExit("these files have no rows for " + ", ".join(options.only or PLOTS))
    print("\n".join(drawn))


def load(files: Iterable[Path]) -> tuple[list[Row], list[str]]:
    """The rows, each with the number of its `file`; and a caption for each file. Of a command that was run more than
    once into a file (`run` 1, 2, ...), the first."""
    rows, captions = [], []
    for number, file in enumerate(files):
        header, *of_file = [json.loads(line) for line in file.read_text().splitlines()]
        if not header.get("environment"):
            raise SystemExit(f"{file}: its first line is no environment header; is it from the bench?")
        names = {"driver": "driver", "torch": "torch", "nccl": "NCCL", "deep_ep": "", "megatron_core": "megatron-core"}
        names |= {"transformer_engine": "TransformerEngine", "commit": "commit"}
        facts = [header.get("gpu") or header.get("cpu", "")]
        facts += [f"{label} {header[name]}".strip() for name, label in names.items() if header.get(name)]
        captions.append(f"{', '.join(facts)}; {header['command']}")
        rows += [row | {"file": number} for row in of_file if row.get("run", 1) == 1]
    return rows, captions


def make(plot: Plot, rows: list[Row], captions: list[str]) -> Figure | None:
    """The figure, side by side up to three panels; None if the rows have nothing for it."""
    rows = plot.select(rows)
    if not rows:
        return None
    files = sorted({row["file"] for row in rows})
    tags = {file: f" [{i}]" if len(files) > 1 else "" for i, file in enumerate(files, start=1)}
    kinds = [f", {row.get('expert_backend', 'megatron')} experts" for row in rows]
    kinds = kinds if len(set(kinds)) > 1 else [""] * len(rows)
    rows = [row | {"series": row["variant"] + kind + tags[row["file"]]} for row, kind in zip(rows, kinds)]
    panels = list(dict.fromkeys(plot.panel(row) for row in rows))
    lines = -(-len(panels) // (columns := min(3, len(panels))))
    tallest = max(sum(plot.panel(row) == name for row in rows) for name in panels)
    width, height = 5.2 * columns + 1.5, max(3.4, 0.24 * tallest + 1.2) * lines + 0.8
    figure, grid = plt.subplots(lines, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axes, name in zip(grid.flat, panels):
        plot.draw(axes, [row for row in rows if plot.panel(row) == name])
        axes.set_title(name, fontsize="small")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(plot.title, fontsize="medium")
    text = [textwrap.fill(f"{tags[file]} {captions[file]}".strip(), int(width * _CHARACTERS_AN_INCH)) for file in files]
    figure.supxlabel("\n".join(text), fontsize="x-small", x=0.01, ha="left")
    return figure


def _times(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "forward_backward_us" in row]


def _time_bars(axes: Axes, rows: list[Row]) -> None:
    for i, row in enumerate(rows):
        color = f"C{0 if row['variant'].startswith('raw') else 2 if row.get('buffer') else 1}"
        median, p20, p80 = (row[f"forward_backward{part}_us"] / 1e3 for part in ("", "_p20", "_p80"))
        whiskers = [[max(0.0, median - p20)], [max(0.0, p80 - median)]]
        axes.barh(i, median, xerr=whiskers, color=color, hatch="//" if row["noise"] else None, alpha=0.6, capsize=2)
        axes.barh(i, row["forward_us"] / 1e3, color=color)
        axes.text(median, i - 0.3, f" {median:.2f}", va="bottom", fontsize="x-small")
    axes.set_yticks(range(len(rows)), _labels(rows))
    axes.invert_yaxis()
    axes.set(xlabel="ms")


def _sms(rows: list[Row]) -> list[Row]:
    return _with_several([row for row in rows if "gb_per_s" in row and row["num_sms"]], "num_sms", _panel)


def _sms_markers(axes: Axes, rows: list[Row]) -> None:
    _markers(axes, rows, "num_sms", "gb_per_s")
    for link in sorted({row["link_gb_per_s"] for row in rows}):
        axes.axhline(link, color="gray", linestyle="--", label="link, all_to_all_single")
    axes.legend(fontsize="x-small")
    axes.set(xlabel="SMs", ylabel="GB/s a rank", ylim=(0, None), xticks=sorted({row["num_sms"] for row in rows}))


def _tokens(rows: list[Row]) -> list[Row]:
    timed = [row | {"ms": row["forward_backward_us"] / 1e3} for row in _times(rows)]
    return _with_several(timed, "tokens_per_rank", _shape)


def _token_markers(axes: Axes, rows: list[Row]) -> None:
    _markers(axes, rows, "tokens_per_rank", "ms")
    axes.set(xlabel="tokens a rank", ylabel="ms", xscale="log", yscale="log")
    axes.set_xticks(ticks := sorted({row["tokens_per_rank"] for row in rows}), [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _steps(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "step_ms" in row]


def _step_bars(axes: Axes, rows: list[Row]) -> None:
    for i, row in enumerate(rows):
        left = 0.0
        shares = {"dispatch": row["dispatch_percent"], "combine": row["combine_percent"]}
        shares["the rest"] = 100 - sum(shares.values())
        for color, (name, share) in enumerate(shares.items()):
            width = row["step_ms"] * share / 100
            hatch = "//" if row["noise"] else None
            axes.barh(i, width, left=left, color=f"C{color}", hatch=hatch, label=name if i == 0 else None)
            left += width
        axes.text(left, i, f" {row['step_ms']:.1f}", va="center", fontsize="x-small")
    axes.set_yticks(range(len(rows)), _labels(rows))
    axes.invert_yaxis()
    axes.set(xlabel="ms", xlim=(0, 1.4 * max(row["step_ms"] for row in rows)))
    axes.legend(fontsize="x-small", loc="upper right")


def _tune(rows: list[Row]) -> list[Row]:
    return _with_several([row for row in _steps(rows) if row["num_sms"]], "num_sms", _step_panel)


def _tune_markers(axes: Axes, rows: list[Row]) -> None:
    _markers(axes, rows, "num_sms", "step_ms")
    axes.set(xlabel="SMs", ylabel="ms", xticks=sorted({row["num_sms"] for row in rows}))


def _markers(axes: Axes, rows: list[Row], x: str, y: str) -> None:
    """One marker for each row, hollow where noisy; no line between them."""
    for i, name in enumerate(dict.fromkeys(row["series"] for row in rows)):
        label: str | None = name
        for noisy in (False, True):
            chosen = [row for row in rows if row["series"] == name and bool(row["noise"]) == noisy]
            if chosen:
                axes.plot(
                    [row[x] for row in chosen],
                    [row[y] for row in chosen],
                    linestyle="none",
                    marker=_MARKERS[i % len(_MARKERS)],
                    color=f"C{i % 10}",
                    fillstyle="none" if noisy else "full",
                    label=label,
                )
                label = None
    axes.legend(fontsize="x-small")


def _with_several(rows: list[Row], name: str, panel_of: Callable[[Row], str]) -> list[Row]:
    """The rows of those variants that were measured at several values of `name` in one environment."""

    def key(row: Row) -> tuple[object, ...]:
        return row["variant"], row.get("expert_backend"), row["file"], panel_of(row)

    values: dict[tuple[object, ...], set[object]] = {}
    for row in rows:
        values.setdefault(key(row), set()).add(row[name])
    return [row for row in rows if len(values[key(row)]) > 1]


def _labels(rows: list[Row]) -> list[str]:
    """Of bars: the variant, with its SM count where it has several."""
    names = [row["series"] for row in rows]
    return [
        name + (f", {row['num_sms']} SMs" if names.count(name) > 1 and row["num_sms"] else "")
        for name, row in zip(names, rows, strict=True)
    ]


def _shape(row: Row) -> str:
    shape = f"{row['shape']} (H {row['hidden']}, E {row['experts']}, top-{row['topk']})"
    return f"{shape}\n{row['routing']}, {row['dtype']}, {row['ranks']} ranks"


def _panel(row: Row) -> str:
    return f"{_shape(row)}, {row['tokens_per_rank']} tokens a rank"


def _step_panel(row: Row) -> str:
    batch = f"{row['micro_batches']} x {row['tokens_per_rank']} tokens a rank"
    return f"{row['shape']}, {row['layers']} layers, {row['ranks']} ranks\n{batch}"


_LAYER = "dispatch and combine of one layer"
PLOTS = {
    "times": Plot(_times, _panel, _time_bars, f"{_LAYER}: forward (dark), forward + backward (light); slowest rank"),
    "sms": Plot(_sms, _panel, _sms_markers, f"{_LAYER}, forward + backward: bandwidth out of a rank"),
    "tokens": Plot(_tokens, _shape, _token_markers, f"{_LAYER}, forward + backward; slowest rank"),
    "step": Plot(_steps, _step_panel, _step_bars, "a training step, slowest rank; its parts, mean over ranks"),
    "tune": Plot(_tune, _step_panel, _tune_markers, "a training step, slowest rank"),
}


if __name__ == "__main__":
    main()
