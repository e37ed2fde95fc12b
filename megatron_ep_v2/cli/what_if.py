"""`python -m megatron_ep_v2 what-if FILE`: the overload of recorded steps, and what redundant experts would leave."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ep_v2.balance.planner import FROM_PERCENT, MIN_ROWS
from megatron_ep_v2.balance.what_if import EXPERT_SHARE, Prediction, predict, recorded, step_gain
from megatron_ep_v2.bench.report import aligned
from megatron_ep_v2.cli import prog
from megatron_ep_v2.errors import SettingsError

_DESCRIPTION = """\
Overload of a layer: rows that its busiest rank receives in a micro-batch, over the mean of all ranks. Printed as
recorded and with replica slots on each rank, which take rows of the busiest ranks' largest experts: mean over the
micro-batches, largest in brackets. The last line is a prediction, if a step takes 1 + f (x - 1) at overload x, without
what moving the replicas' weights and gradients costs."""


def what_if(arguments: list[str]) -> None:
    """Read a recording, plan every micro-batch of every layer, print a table; with --json, one document.

    Args:
        arguments: As `--help` lists them.

    Raises:
        InputError: The file is no recording.
        SettingsError: A number is out of range.
    """
    parser = argparse.ArgumentParser(
        prog=f"{prog()} what-if", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="expert_load.jsonl, as --record-load writes it")
    parser.add_argument(
        "--slots", nargs="+", type=int, default=[1, 2], metavar="R", help="replica slots on each rank; default 1 2"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=EXPERT_SHARE,
        metavar="F",
        help=f"f, the part of a step that waits for the busiest rank; default {EXPERT_SHARE}, docs/balance.md says how "
        "to measure it",
    )
    parser.add_argument(
        "--min-rows", type=int, default=MIN_ROWS, metavar="N", help=f"fewest for a replica; default {MIN_ROWS}"
    )
    parser.add_argument(
        "--from-percent",
        type=int,
        default=FROM_PERCENT,
        metavar="N",
        help=f"plan nothing while the busiest rank has less of the mean; default {FROM_PERCENT}",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args(arguments)
    if min(options.slots) < 1 or options.min_rows < 1 or options.from_percent < 100 or not 0 <= options.share <= 1:
        raise SettingsError(
            "a number is out of range",
            found=f"--slots {' '.join(map(str, options.slots))} --min-rows {options.min_rows} "
            f"--from-percent {options.from_percent} --share {options.share}",
            needed="slots and rows of 1 or more, 100 percent or more, a share from 0 to 1",
            fix=f"--slots 1 2 --min-rows {MIN_ROWS} --from-percent {FROM_PERCENT} --share {EXPERT_SHARE}",
        )
    loads = recorded(options.file)
    layers, together = predict(loads, [0, *options.slots], options.min_rows, options.from_percent)
    now = together[0]
    gains = [step_gain(now.mean, after.mean, options.share) for after in together]
    micro_batches, _, ranks, local = loads.shape
    if options.json:
        document = {
            "micro_batches": micro_batches,
            "ranks": ranks,
            "experts": ranks * local,
            "layers": [[asdict(each) for each in by_slots] for by_slots in layers],
            "all": [asdict(each) | {"step_gain": gain} for each, gain in zip(together, gains, strict=True)],
        }
        print(json.dumps(document))
        return
    print(
        f"{options.file}: {micro_batches} micro-batches, {len(layers)} layers, {ranks * local} experts, {ranks} ranks"
    )
    print("\n".join(_table(layers, together, gains)))
    print(f"step: predicted, in tokens a second, for f = {options.share}")
    if not any(each.replicas for each in together):
        print(f"nothing was planned: --min-rows {options.min_rows}, --from-percent {options.from_percent}")


def _table(layers: Sequence[Sequence[Prediction]], together: Sequence[Prediction], gains: Sequence[float]) -> list[str]:
    """A line for each layer and for all of them, the replicas, and the step."""

    def overload(of: Prediction) -> str:
        return f"{of.mean:.2f} ({of.largest:.2f})"

    rows: list[dict[str, Any]] = [
        {"name": name, "cells": [overload(each) for each in by_slots]}
        for name, by_slots in [*((f"layer {n}", of) for n, of in enumerate(layers)), ("all layers", together)]
    ]
    rows.append({"name": "replicas a layer", "cells": [f"{each.replicas:.1f}" for each in together]})
    rows.append({"name": "step", "cells": ["", *(f"{gain:+.1%}" for gain in gains[1:])]})
    columns: dict[str, Callable[[dict[str, Any]], str]] = {"overload, mean (largest)": lambda row: row["name"]}
    for n, each in enumerate(together):
        title = "as recorded" if not each.num_slots else f"{each.num_slots} slot" + "s" * (each.num_slots > 1)
        columns[title] = lambda row, n=n: row["cells"][n]  # type: ignore[misc]
    return aligned(columns, rows)
