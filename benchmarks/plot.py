"""Pictures of the rows of `python -m megatron_ep_v2 bench`: SVG and PNG, as many as the rows give.

    python benchmarks/plot.py benchmarks/results/h200x8/bench.jsonl ... --out benchmarks/results/h200x8/plots

    times.*   forward and backward of each dispatcher, a panel for each shape and routing
    sms.*     bandwidth against SMs, with the link measured in the same run as a line
    tokens.*  time against tokens per rank
    step.*    a whole training step: dispatch, combine and the rest
    tune.*    a whole training step against SMs

What was measured is a bar or a marker; nothing is drawn between markers. Whiskers are the 20th and 80th percentile, a
hatched bar or a hollow marker is a row that the bench called noisy. Hardware, versions and command, from the files'
headers, stand below each picture. Several files (environments that exclude each other) go into one picture, numbered.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "megatron_ep_v2"  # the same rows give the same file

Row = dict[str, Any]
_MARKERS = "osD^v<>Pph*X"
_CAPTION_WIDTH = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=list(PLOTS), help="default: all that the rows give")
    options = parser.parse_args()
    rows, caption = load(options.files)
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = [name for name in options.only or PLOTS if draw(name, rows, caption, options.out)]
    if not drawn:
        raise SystemExit("these files have no rows for " + (", ".join(options.only or PLOTS)))
    print("\n".join(str(options.out / f"{name}.{kind}") for name in drawn for kind in ("svg", "png")))


def load(files: Iterable[Path]) -> tuple[list[Row], str]:
    """The rows that have a time, each with the number of its `file`; and the caption."""
    rows, captions = [], []
    files = list(files)
    for number, file in enumerate(files, start=1):
        header, *of_file = [json.loads(line) for line in file.read_text().splitlines()]
        if not header.get("environment"):
            raise SystemExit(f"{file}: its first line is no environment header; is it from the bench?")
        tag = f" [{number}]" if len(files) > 1 else ""
        captions.append(_caption(header, tag))
        rows += [row | {"file": tag} for row in of_file if row["status"] == "ok"]
    return rows, "\n".join(captions)


def _caption(header: Row, tag: str) -> str:
    names = {"driver": "driver", "torch": "torch", "nccl": "NCCL", "deep_ep": "", "megatron_core": "megatron-core"}
    names |= {"transformer_engine": "TransformerEngine", "commit": "commit"}
    facts = [header.get("gpu") or header.get("cpu", "")]
    facts += [f"{label} {header[name]}".strip() for name, label in names.items() if header.get(name)]
    return textwrap.fill(f"{tag.strip()} {', '.join(facts)}; {header['command']}".strip(), _CAPTION_WIDTH)


def draw(name: str, rows: list[Row], caption: str, out: Path) -> bool:
    """One picture as SVG and PNG; False if the rows have nothing for it."""
    figure = PLOTS[name](rows)
    if figure is None:
        return False
    figure.supxlabel(caption, fontsize="x-small", x=0.01, ha="left")
    for kind, metadata in (("svg", {"Date": None}), ("png", {})):
        figure.savefig(out / f"{name}.{kind}", dpi=150, metadata=metadata)
    plt.close(figure)
    return True


def _times(rows: list[Row]) -> Any:
    rows = [row for row in rows if "forward_backward_us" in row]
    return _panels(rows, _place, _time_bars)


def _time_bars(axes: Any, rows: list[Row]) -> None:
    labels = _labels(rows)
    for i, row in enumerate(rows):
        color = f"C{0 if row['variant'].startswith('raw') else 2 if row.get('buffer') else 1}"
        median, p20, p80 = (row[f"forward_backward{part}_us"] / 1e3 for part in ("", "_p20", "_p80"))
        whiskers = [[max(0.0, median - p20)], [max(0.0, p80 - median)]]
        axes.barh(i, median, xerr=whiskers, color=color, hatch="//" if row["noise"] else None, alpha=0.6, capsize=2)
        axes.barh(i, row["forward_us"] / 1e3, color=color)
        axes.text(median, i - 0.3, f" {median:.2f}", va="bottom", fontsize="x-small")
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="ms a layer: forward (dark), forward + backward; slowest rank")


def _sms(rows: list[Row]) -> Any:
    rows = _with_several([row for row in rows if "gb_per_s" in row and row["num_sms"]], "num_sms", _place)
    return _panels(rows, _place, _sms_markers)


def _sms_markers(axes: Any, rows: list[Row]) -> None:
    _markers(axes, rows, "num_sms", "gb_per_s")
    for tag in sorted({row["file"] for row in rows}):
        link = next(row["link_gb_per_s"] for row in rows if row["file"] == tag)
        axes.axhline(link, color="gray", linestyle="--", label=f"link, all_to_all_single{tag}")
    axes.set(xlabel="SMs", ylabel="GB/s a rank, forward + backward", ylim=(0, None))


def _tokens(rows: list[Row]) -> Any:
    rows = [row for row in rows if "forward_backward_us" in row]
    rows = _with_several([row | {"ms": row["forward_backward_us"] / 1e3} for row in rows], "tokens_per_rank", _shape)
    return _panels(rows, _shape, _token_markers)


def _token_markers(axes: Any, rows: list[Row]) -> None:
    _markers(axes, rows, "tokens_per_rank", "ms")
    axes.set(xlabel="tokens a rank", ylabel="ms a layer, forward + backward", xscale="log", yscale="log")
    axes.set_xticks(ticks := sorted({row["tokens_per_rank"] for row in rows}), [str(tick) for tick in ticks])
    axes.minorticks_off()


def _steps(rows: list[Row]) -> Any:
    return _panels([row for row in rows if "step_ms" in row], _step_place, _step_bars)


def _step_bars(axes: Any, rows: list[Row]) -> None:
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
    axes.set(xlabel="ms a step, slowest rank; shares are means over ranks")
    axes.legend(fontsize="x-small", loc="lower right")


def _tune(rows: list[Row]) -> Any:
    rows = _with_several([row for row in rows if "step_ms" in row and row["num_sms"]], "num_sms", _step_place)
    return _panels(rows, _step_place, _tune_markers)


def _tune_markers(axes: Any, rows: list[Row]) -> None:
    _markers(axes, rows, "num_sms", "step_ms")
    axes.set(xlabel="SMs", ylabel="ms a step")


def _panels(rows: list[Row], place: Callable[[Row], str], draw_one: Callable[[Any, list[Row]], None]) -> Any:
    """A figure with one panel for each place, side by side up to three; None without rows."""
    places = list(dict.fromkeys(place(row) for row in rows))
    if not places:
        return None
    columns = min(3, len(places))
    lines = -(-len(places) // columns)
    tallest = max(sum(place(row) == name for row in rows) for name in places)
    height = max(3.4, 0.24 * tallest + 1.2) * lines + 0.8
    size = (5.2 * columns + 1.5, height)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, name in zip(grid.flat, places):
        draw_one(axes, [row for row in rows if place(row) == name])
        axes.set_title(name, fontsize="small")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    for axes in grid.flat[len(places) :]:
        axes.set_visible(False)
    return figure


def _markers(axes: Any, rows: list[Row], x: str, y: str) -> None:
    """One marker for each row, hollow where noisy; no line between them."""
    series = list(dict.fromkeys(row["variant"] + row["file"] for row in rows))
    for i, name in enumerate(series):
        of_series = [row for row in rows if row["variant"] + row["file"] == name]
        for noisy in (False, True):
            chosen = [row for row in of_series if bool(row["noise"]) == noisy]
            axes.plot(
                [row[x] for row in chosen],
                [row[y] for row in chosen],
                linestyle="none",
                marker=_MARKERS[i % len(_MARKERS)],
                color=f"C{i % 10}",
                fillstyle="none" if noisy else "full",
                label=name if noisy == bool(of_series[0]["noise"]) else None,
            )
    axes.legend(fontsize="x-small")


def _with_several(rows: list[Row], name: str, place: Callable[[Row], str]) -> list[Row]:
    """The rows of those variants that were measured at several values of `name` in one place."""

    def key(row: Row) -> tuple[str, str, str]:
        return row["variant"], row["file"], place(row)

    values: dict[tuple[str, str, str], set[Any]] = {}
    for row in rows:
        values.setdefault(key(row), set()).add(row[name])
    return [row for row in rows if len(values[key(row)]) > 1]


def _labels(rows: list[Row]) -> list[str]:
    """Of bars: the variant, with its SM count where it has several."""
    names = [row["variant"] + row["file"] for row in rows]
    return [
        name + (f", {row['num_sms']} SMs" if names.count(name) > 1 and row["num_sms"] else "")
        for name, row in zip(names, rows, strict=True)
    ]


def _shape(row: Row) -> str:
    return (
        f"{row['shape']} (H {row['hidden']}, E {row['experts']}, top-{row['topk']}), {row['routing']}, {row['dtype']}, "
        f"{row['ranks']} ranks"
    )


def _place(row: Row) -> str:
    return f"{_shape(row)}\n{row['tokens_per_rank']} tokens a rank"


def _step_place(row: Row) -> str:
    batch = f"{row['micro_batches']} x {row['tokens_per_rank']} tokens a rank"
    return f"{row['shape']}, {row['layers']} layers, {row['ranks']} ranks\n{batch}"


PLOTS: dict[str, Callable[[list[Row]], Any]] = {
    "times": _times,
    "sms": _sms,
    "tokens": _tokens,
    "step": _steps,
    "tune": _tune,
}


if __name__ == "__main__":
    main()
