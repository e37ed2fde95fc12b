"""What the rows of whole steps say: a table, the curve over SM counts, and the settings to copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_ep_v2.bench.report import aligned, or_dash, problems
from megatron_ep_v2.settings import variable

_BAR = 40  # characters of the longest bar
_EQUAL = 0.01  # steps that differ by less are called equal


def step_table(rows: Sequence[dict[str, Any]]) -> str:
    """Common facts, a line for each measured variant, and what could not be measured, with why."""
    first = rows[0]
    busiest = "" if first["busiest_expert_load"] is None else f", busiest expert {first['busiest_expert_load']:.2f} x"
    text = [
        f"{first['shape']}: whole training step, {first['layers']} layers, hidden {first['hidden']}, "
        f"top-{first['topk']} of {first['experts']} experts of width {first['expert_ffn']}, {first['dtype']}",
        f"{first['ranks']} ranks, {first['micro_batches']} micro-batch(es) of {first['tokens_per_rank']} tokens a rank"
        f"{busiest}",
        f"floating-point operations: {first['flops']}",
    ]
    columns = {
        "variant": lambda row: row["variant"],
        "SMs": lambda row: or_dash(row["num_sms"] or None, "d"),
        "step ms": lambda row: f"{row['step_ms']:.1f}",
        "p20": lambda row: f"{row['step_p20_ms']:.1f}",
        "p80": lambda row: f"{row['step_p80_ms']:.1f}",
        "/alltoall": lambda row: or_dash(row["ratio_to_alltoall"], ".3f"),
        "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
        "TFLOP/s a rank": lambda row: f"{row['tflops_per_rank']:.4g}",
        "dispatch %": lambda row: f"{row['dispatch_percent']:.1f}",
        "combine %": lambda row: f"{row['combine_percent']:.1f}",
        "peak MiB": lambda row: or_dash(row["peak_memory_mib"], ".0f"),
        "": lambda row: "noisy" if row["noise"] else "",
    }
    text += aligned(columns, [row for row in rows if "step_ms" in row])
    return "\n".join(text + problems(rows))


def advice(rows: Sequence[dict[str, Any]]) -> str:
    """The curve of this package's rows, a bar each, and the settings of the best: of the shortest median step.

    Args:
        rows: Those with a `layout` are this package's.
    """
    timed = sorted(
        (row for row in rows if "step_ms" in row and row["layout"]),
        key=lambda row: (row["variant"], row["num_sms"] or 0),
    )
    if not timed:
        return "nothing could be measured, so there is nothing to advise"
    longest = max(row["step_ms"] for row in timed)
    width = max(len(row["variant"]) for row in timed)
    text = ["step by SM count, ms:"]
    for row in timed:
        bar = "#" * max(1, round(_BAR * row["step_ms"] / longest))
        text.append(
            f"  {row['variant']:<{width}}  {or_dash(row['num_sms'] or None, 'd'):>4}  {row['step_ms']:9.2f}  {bar}"
        )
    best = min(timed, key=lambda row: row["step_ms"])
    equal = [row for row in timed if row is not best and row["step_ms"] <= best["step_ms"] * (1 + _EQUAL)]
    text.append(f"best: {_name(best)}, {best['step_ms']:.2f} ms a step" + (" (a noisy row)" if best["noise"] else ""))
    if equal:
        text.append(f"within {_EQUAL:.0%} of it: " + "; ".join(_name(row) for row in equal))
    if best["num_sms"]:
        text.append(f"export {variable('num_sms')}={best['num_sms']}")
    text.append(f"export {variable('layout')}={best['layout']}")
    if best["variant"].endswith("+fused-permute"):
        text.append("and Megatron's --moe-permute-fusion")
    return "\n".join(text)


def _name(row: dict[str, Any]) -> str:
    return row["variant"] + (f", {row['num_sms']} SMs" if row["num_sms"] else "")
