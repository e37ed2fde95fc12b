"""What the bench writes: an environment header, an aligned table, JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from megatron_ep_v2.bench.rows import Row
from megatron_ep_v2.probe import loaded_nccl_version, probe

_ROOT = Path(__file__).resolve().parents[2]


def environment(command: str) -> dict[str, object]:
    """Hardware, versions, commit and command: the first row of a results file."""
    header: dict[str, object] = {
        "environment": True,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        header |= {
            "gpu": f"{torch.cuda.device_count()} x {gpu.name}",
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "cuda": torch.version.cuda,
            "nccl": loaded_nccl_version(),
            "deep_ep": probe().describe(),
            "transformer_engine": _version("transformer-engine"),
        }
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        header["cpu"] = f"{len(names)} x {names[0]}" if names else platform.processor()
    header["megatron_core"] = _version("megatron-core")
    commit = output_of("git", "-C", str(_ROOT), "describe", "--always", "--dirty")
    header["commit"] = commit if (_ROOT / ".git").exists() else f"megatron_ep_v2 {_version('megatron_ep_v2')}"
    header["command"] = command
    return header


def output_of(*command: str) -> str:
    """What a command prints, or "unknown"."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_rows(path: Path, header: dict[str, object], rows: Sequence[Row]) -> None:
    """A JSONL file, header first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))


def table(rows: Sequence[Row]) -> str:
    """One table: a line of common facts, a line for each measured variant, and what could not be measured, with why."""
    first = rows[0]
    text = [
        f"{first['shape']}: hidden {first['hidden']}, {first['experts']} experts, top-{first['topk']}; "
        f"{first['tokens_per_rank']} tokens a rank on {first['ranks']} ranks, {first['dtype']}",
        f"{first['routing']} routing: the busiest expert has {first['busiest_expert_load']:.2f} x the mean, "
        f"the busiest rank {first['busiest_rank_load']:.2f} x",
        f"forward + backward: logical {first['logical_bytes'] / 2**20:.1f} MiB, on the wire "
        f"{first['wire_bytes'] / 2**20:.1f} MiB (a token once per rank); link {first['link_gb_per_s']:.4g} GB/s",
    ]
    columns: dict[str, Callable[[Row], str]] = {
        "variant": lambda row: row["variant"],
        "SMs": lambda row: or_dash(row["num_sms"] or None, "d"),
        "fwd us": lambda row: f"{row['forward_us']:.0f}",
        "fwd+bwd us": lambda row: f"{row['forward_backward_us']:.0f}",
        "p20": lambda row: f"{row['forward_backward_p20_us']:.0f}",
        "p80": lambda row: f"{row['forward_backward_p80_us']:.0f}",
        "alone us": lambda row: or_dash(row.get("alone_us"), ".0f"),
        "/raw": lambda row: or_dash(row["ratio_to_raw"], ".2f"),
        "/alltoall": lambda row: or_dash(row["ratio_to_alltoall"], ".2f"),
        "GB/s": lambda row: f"{row['gb_per_s']:.4g}",
        "% link": lambda row: f"{row['percent_of_link']:.0f}",
        "peak MiB": lambda row: or_dash(row["peak_memory_mib"], ".0f"),
        "host us": lambda row: f"{row['host_us']:.0f}",
        "": lambda row: "noisy" if row["noise"] else "",
    }
    text += aligned(columns, [row for row in rows if "forward_backward_us" in row])
    return "\n".join(text + problems(rows))


def aligned(columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> list[str]:
    """Lines of a table: a heading, then a line for each row; the first column to the left, the last one ragged."""
    if not rows:
        return []
    cells = [list(columns), *([make(row) for make in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        padded[0], padded[-1] = line[0].ljust(widths[0]), line[-1]
        lines.append("  ".join(padded).rstrip())
    return lines


def problems(rows: Sequence[Row]) -> list[str]:
    """Lines about the variants that have no time, with why."""
    lines = [f"{row['variant']}: {row['reason']}; not timed" for row in rows if row["status"] == "wrong"]
    for row in rows:
        if row["status"] == "unavailable":
            reason = [line for line in row["reason"].splitlines() if not line.startswith(("  needed:", "  fix:"))]
            lines.append(f"{row['variant']}: not available: {' '.join(' '.join(reason).split())[:240]}")
    return lines


def summary(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What to know about a whole run: which rows are noisy, and which variants are wrong."""

    def name(row: Row) -> str:
        sms = f" {row['num_sms']} SMs" if row["num_sms"] else ""
        experts = f", {row['expert_backend']} experts" if row.get("expert_backend") else ""
        overload = f", overload {row['overload']}" if row.get("overload") else ""
        what = f"{row['shape']}, {row['routing']} routing{overload}, {row['tokens_per_rank']} tokens"
        return f"{what}, {row['variant']}{sms}{experts}"

    return {
        "noisy": [f"{name(row)}: {row['noise']}" for row in rows if row.get("noise")],
        "wrong": [f"{name(row)}: {row['reason']}" for row in rows if row["status"] == "wrong"],
    }


def noise_warning(of: Mapping[str, list[str]]) -> str:
    """About a `summary`, for people; "" where there is nothing to say."""
    if not of["noisy"]:
        return ""
    lines = "".join(f"  {line}\n" for line in of["noisy"])
    return f"This machine was too noisy for these rows; they may differ by more than 10 % in another run:\n{lines}\n"


def or_dash(value: object, form: str) -> str:
    """Formatted; "-" for None."""
    return "-" if value is None else format(value, form)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
