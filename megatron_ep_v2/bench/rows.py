"""From times to rows: medians, bandwidth, memory, ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from megatron_ep_v2.bench.timing import summarise

Row: TypeAlias = dict[str, Any]  # JSON-able values by the name of their field; each kind of row has its own fields


def spread(kind: str, times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of one kind's times, as fields `KIND_us`, `KIND_p20_us`, `KIND_p80_us`.

    Args:
        times: Microseconds of each repeat.
    """
    of_kind = summarise(times)
    parts = {"": of_kind.median, "_p20": of_kind.p20, "_p80": of_kind.p80}
    return {f"{kind}{part}_us": round(value, 1) for part, value in parts.items()}


def ratio(times: Sequence[float], base: Sequence[float], digits: int = 3) -> float:
    """Median of the times over the median of others, which were taken in turn with them."""
    return round(summarise(times).median / summarise(base).median, digits)


def timed(times: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]] | None = None) -> dict[str, float]:
    """The fields of a row about all kinds of its times: `spread`, and `KIND_ratio` to those of `base`."""
    row: dict[str, float] = {}
    for kind, values in times.items():
        row |= spread(kind, values)
        if base is not None:
            row[f"{kind}_ratio"] = ratio(values, base[kind], 4)
    return row


def measured(times: Mapping[str, Sequence[float]], wire_bytes: int, link_gb_per_s: float) -> Row:
    """What a row says about its times.

    Args:
        times: Microseconds of each repeat by kind, of the slowest rank ("forward", "forward_backward" and, on GPUs,
            "alone"; "host"); bytes in "peak_memory".
        wire_bytes: Of a forward and backward, out of the busiest rank.
        link_gb_per_s: Measured in the same run.
    """
    kinds = ("forward", "forward_backward", "alone", "host")
    row: Row = timed({kind: times[kind] for kind in kinds if times.get(kind)})
    gb_per_s = wire_bytes / row["forward_backward_us"] / 1e3
    peak = times["peak_memory"][0]
    return row | {
        "gb_per_s": float(f"{gb_per_s:.4g}"),
        "percent_of_link": round(100 * gb_per_s / link_gb_per_s, 1),
        "peak_memory_mib": None if math.isnan(peak) else round(peak / 2**20, 1),
        "noise": summarise(times["forward_backward"]).noise,
    }


def add_ratios(rows: Sequence[Row]) -> None:
    """How many times as long a row takes as the raw calls of its own buffer, layout and SM count; and as Megatron's
    faster alltoall row. Each row has its `buffer` and `layout`."""
    timed = [row for row in rows if "forward_backward_us" in row]
    floors = {_floor(row): row["forward_backward_us"] for row in timed if row["variant"].startswith("raw-")}
    alltoall = [row["forward_backward_us"] for row in timed if row["variant"].startswith("alltoall")]
    for row in timed:
        time, floor = row["forward_backward_us"], floors.get(_floor(row))
        row["ratio_to_raw"] = round(time / floor, 3) if floor else None
        row["ratio_to_alltoall"] = round(time / min(alltoall), 3) if alltoall else None


def _floor(row: Row) -> tuple[object, ...]:
    return row["buffer"], row["layout"], row["num_sms"]
