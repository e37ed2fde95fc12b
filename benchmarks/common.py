"""What the scripts here share: the bench's environment header and results file, and one flex dispatcher on its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep_v2.bench import report
from megatron_ep_v2.bench.variants import Variant, make_dispatchers


def environment(script: str) -> dict[str, Any]:
    """Hardware, versions, commit and command: the first row of every results file."""
    return report.environment(" ".join([script, *sys.argv[1:]]))


def write_rows(path: Path | None, header: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """A JSONL file, header first; and one JSON document as the last line on stdout."""
    if path:
        report.write_rows(path, header, rows)
    print(json.dumps({"environment": header, "rows": list(rows)}))


def make_flex_dispatcher(*, hidden: int, experts: int, topk: int) -> Any:
    """Megatron's flex token dispatcher over the whole world, outside any model, as `install()` has set it up."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    (dispatcher,), _ = make_dispatchers(
        Variant("flex", "flex"),
        1,
        dist.group.WORLD,
        alone,
        hidden=hidden,
        experts=experts,
        topk=topk,
        dtype=torch.bfloat16,
    )
    return dispatcher
