"""The end of a run: a loss plot and one JSON document."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from pathlib import Path
from typing import Any

import megatron_ep_v2

from .data import Samples
from .options import Options
from .runtime import Runtime

SMOOTHED = 10  # steps of the running mean in the plot
PACKAGES = ("torch", "megatron-core", "transformer_engine", "deep_ep")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "megatron_ep_v2": megatron_ep_v2.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summary(
    options: Options,
    runtime: Runtime,
    samples: Samples,
    rows: list[dict[str, Any]],
    stopped_by: str | None,
    status: dict[str, Any] | None,
) -> dict[str, Any]:
    """What the last line of stdout says.

    train_loss and overload_mean are means of the last ten steps. tokens_per_second is the median over the steps,
    evaluations apart.
    """
    val_loss = next((row["val_loss"] for row in reversed(rows) if "val_loss" in row), None)
    overloads = [row["overload_mean"] for row in rows[-10:] if "overload_mean" in row]  # not of older versions' steps
    return {
        "steps": rows[-1]["step"] if rows else 0,
        "stopped_by": stopped_by,
        "tokens": rows[-1]["tokens"] if rows else 0,
        "train_loss": _rounded(statistics.fmean(row["loss"] for row in rows[-10:]) if rows else None),
        "val_loss": _rounded(val_loss),
        "unigram_entropy": _rounded(samples.unigram_entropy),
        "below_unigram_entropy": None if val_loss is None else val_loss < samples.unigram_entropy,
        "tokens_per_second": round(statistics.median(r["tokens_per_second"] for r in rows)) if rows else None,
        "expert_balance": _rounded(rows[-1]["expert_balance"] if rows else None),
        "overload_mean": _rounded(statistics.fmean(overloads) if overloads else None),
        "preset": options.preset,
        "dispatcher": options.dispatcher,
        "processes": runtime.world,
        "device": runtime.device.type,
        "data": samples.description,
        "versions": versions(),
        "status": status,
    }


def plot(rows: list[dict[str, Any]], unigram_entropy: float, out: Path, title: str) -> list[Path]:
    """Training and validation loss over the steps, with the unigram entropy as the line to get below; and the overload:
    rows of the busiest rank over the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth = [statistics.fmean(losses[max(0, i + 1 - SMOOTHED) : i + 1]) for i in range(len(losses))]
    valid = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]

    figure, (axes, below) = pyplot.subplots(2, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(steps, smooth, color="tab:blue", label=f"training (mean of {SMOOTHED} steps)")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color="tab:orange", label="validation (held out)")
    axes.axhline(unigram_entropy, color="gray", linestyle="--", label=f"unigram entropy {unigram_entropy:.2f}")
    axes.set(ylabel="loss (nats per token)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    overloads = [(row["step"], row["overload_max"], row["overload_mean"]) for row in rows if "overload_mean" in row]
    if overloads:
        counted, largest, means = zip(*overloads, strict=True)
        below.plot(counted, largest, color="tab:red", alpha=0.25, linewidth=1, label="largest")
        below.plot(counted, means, color="tab:red", label="mean of layers")
        below.legend()
    below.axhline(1.0, color="gray", linestyle="--")
    below.set(xlabel="step", ylabel="overload of ranks")
    below.grid(alpha=0.3)
    paths = [out / "loss.png", out / "loss.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
