"""Converts times to rows: medians, bandwidth, memory, ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ep_v2.bench.timing import summarise


def measured(times: Mapping[str, Sequence[float]], wire_bytes: int, link_gb_per_s: float) -> dict[str, Any]:
    """Fields of a row that depend on its times.

    Args:
        times: Microseconds of each repeat by kind, of the slowest rank ("forward", "forward_backward" and, on GPUs,
            "alone"; "host"); bytes in "peak_memory".
        wire_bytes: Bytes that the busiest rank sends in a forward and backward.
        link_gb_per_s: Link bandwidth measured in the same run.
    """
    row: dict[str, Any] = {}
    for kind in ("forward", "forward_backward", "alone", "host"):
        if times.get(kind):
            of_kind = summarise(times[kind])
            row |= {
                f"{kind}_us": round(of_kind.median, 1),
                f"{kind}_p20_us": round(of_kind.p20, 1),
                f"{kind}_p80_us": round(of_kind.p80, 1),
            }
    gb_per_s = wire_bytes / row["forward_backward_us"] / 1e3
    peak = times["peak_memory"][0]
    return row | {
        "gb_per_s": float(f"{gb_per_s:.4g}"),
        "percent_of_link": round(100 * gb_per_s / link_gb_per_s, 1),
        "peak_memory_mib": None if math.isnan(peak) else round(peak / 2**20, 1),
        "noise": summarise(times["forward_backward"]).noise,
    }


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row the ratio of its time to the raw calls of its buffer, layout and SM count, and to Megatron's
    faster alltoall row. Rows have `buffer` and `layout`."""
    timed = [row for row in rows if "forward_backward_us" in row]
    floors = {_floor(row): row["forward_backward_us"] for row in timed if row["variant"].startswith("raw-")}
    alltoall = [row["forward_backward_us"] for row in timed if row["variant"].startswith("alltoall")]
    for row in timed:
        time, floor = row["forward_backward_us"], floors.get(_floor(row))
        row["ratio_to_raw"] = round(time / floor, 3) if floor else None
        row["ratio_to_alltoall"] = round(time / min(alltoall), 3) if alltoall else None


def _floor(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["buffer"], row["layout"], row["num_sms"]
