"""A MoE layer of this package's own parts, by each way between dispatch and grouped GEMM, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import swiglu_experts
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.layouts import (
    check_overflow,
    gather_with_weights,
    place_contiguous,
    place_masked,
    reduce_rows,
)
from tests.helpers.cases import Case
from tests.helpers.dense_oracle import Experts
from tests.helpers.fused_layer import Step, step_errors, step_of

WAYS = ("expanded", "contiguous", "masked")
ALIGNMENT = 128


def through(
    way: str, group: Any, backend: str, x: Any, topk_idx: Any, probs: Any, w1: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """expanded: rows stay where the dispatch put them; contiguous, masked: compact rows, laid out and added up."""
    local, experts = len(w1), len(w1) * group.size()
    given = (x, topk_idx, probs, experts, group)
    if way == "expanded":
        rows, _, row_probs, counts, handle = fused_dispatch(*given, do_expand=True, expert_alignment=ALIGNMENT)
        y = swiglu_experts(rows, row_probs, w1, w2, Groups.from_counts(counts, rows), backend)
        return fused_combine(y, group, handle)[0]
    received, recv_idx, recv_probs, counts, handle = fused_dispatch(*given, expert_alignment=ALIGNMENT)
    assert recv_idx is not None
    if way == "contiguous":
        places = place_contiguous(recv_idx, None, local, int(counts.sum()), ALIGNMENT)
    else:
        places = place_masked(recv_idx, None, local, max(ALIGNMENT, int(counts.max())))
    check_overflow(places)
    rows, row_probs = gather_with_weights(received, recv_probs, places)
    y = swiglu_experts(rows, row_probs, w1, w2, Groups.from_places(places), backend)
    return fused_combine(reduce_rows(y, places), group, handle)[0]


def train_each_way(
    group: Any, case: Case, ways: Sequence[str], backends: Sequence[str], device: str
) -> dict[tuple[str, str], Step]:
    """(way, backend) -> a training step."""
    found = {}
    for way in ways:
        for backend in backends:

            def layer(x: Any, topk_idx: Any, probs: Any, experts: Experts, way: str = way, on: str = backend) -> Any:
                return through(way, group, on, x, topk_idx, probs, *experts.stacked())

            found[way, backend] = step_of(layer, case, group.rank(), device)
    return found


def errors(case: Case, answers: list[dict[tuple[str, str], Step]]) -> dict[str, float]:
    """ "rank, way, backend, tensor" -> relative L2 against the dense layer."""
    return {
        f"rank {rank}, {way}, {backend}, {name}": error
        for rank, by_run in enumerate(answers)
        for (way, backend), step in by_run.items()
        for name, error in step_errors(case, rank, step).items()
    }
