"""Redundant experts in Megatron's MoE layer: outputs and every gradient as without them, and as a dense layer's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2.megatron.managers import ExpandedManager
from megatron_ep_v2.megatron.redundant import RedundantManager
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.redundant_layer import build, dense, inputs, routing, step, watched
from tests.helpers.shapes import CPU, Shape

KINDS = ("zipf", "one-hot", "empty", "unselected", "equal")
EXACT = replace(CPU, dtype=torch.float64, hidden=16, ffn=8)
MORE = {torch.float64: {"moe_router_dtype": "fp64"}, torch.float32: {}}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype
    scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
    return float((one - other).abs().max()) / scale if one.numel() else 0.0


def compared(group: Any, shape: Shape, slots: int, backend: str) -> dict[str, dict[str, Any]]:
    """By kind of routing: the largest differences to R = 0 and to the dense layer, and what was moved."""
    rank, found = group.rank(), {}
    with process_groups(), pytest.MonkeyPatch.context() as patch:
        if shape.dtype == torch.float64:  # the reference carries fp64 weights next to fp64 rows
            patch.setattr(ExpandedManager, "_probs_in_fp32", lambda self: self.token_probs)
        for kind in KINDS:
            tokens = 24 if kind == "equal" else 40 - 3 * rank  # 24 * top-3 is a multiple of the experts
            topk_idx = routing(kind, shape, rank, tokens)
            x, grad = inputs(shape, len(topk_idx))
            results, rows = [], []
            for number in (0, slots):
                layer = build(shape, backend, topk_idx, number, **MORE[shape.dtype])
                manager = layer.token_dispatcher._comm_manager
                assert isinstance(manager, RedundantManager) == bool(number)
                with watched() as seen:
                    results.append(step(layer, x, grad))
                rows.append(seen.rows[0])
                loads = [load.tolist() for load in megatron_ep_v2.expert_load()]
                results[-1]["load"] = torch.tensor(loads)
            plain, ours = results
            experts = layer.experts
            mine = (x, grad, layer.router.probs.detach(), experts.linear_fc1.weight, experts.linear_fc2.weight)
            parts: list[Any] = [None] * group.size()
            dist.all_gather_object(parts, tuple(tensor.detach() for tensor in mine))
            kinds: list[Any] = [None] * group.size()
            dist.all_gather_object(kinds, topk_idx)
            wanted = dense(shape, kinds, parts)
            local = slice(rank * len(experts.linear_fc1.weight), (rank + 1) * len(experts.linear_fc1.weight))
            w1, w2 = wanted.grad_experts.stacked()
            oracle = {
                "output": wanted.output[rank].view(x.shape),
                "x": wanted.grad_x[rank].view(x.shape),
                "experts.linear_fc1.weight": w1[local],
                "experts.linear_fc2.weight": w2[local],
            }
            found[kind] = {
                "to R = 0": {name: difference(ours[name], plain[name]) for name in plain},
                "to dense": {name: difference(ours[name].double(), value) for name, value in oracle.items()},
                "calls": seen.calls,
                "replicas": len(seen.counts[0]) > len(experts.linear_fc1.weight),
                "rows": (len(rows[0]), len(rows[1])),
                "same rows": torch.equal(rows[0], rows[1]),
            }
    return found


def assert_equal(by_rank: list[dict[str, dict[str, Any]]], shape: Shape) -> None:
    for kind in KINDS:
        for found in (by_kind[kind] for by_kind in by_rank):
            assert set(found["to R = 0"]) == {
                *("output", "x", "router.probs", "load"),
                *("experts.linear_fc1.weight", "experts.linear_fc2.weight"),
            }
            for against in ("to R = 0", "to dense"):
                for name, error in found[against].items():
                    assert error < TOLERANCE[shape.dtype], f"{kind}, {name} {against}: {error:.1e}"
        planned = kind in ("zipf", "one-hot", "unselected")
        before, after = zip(*(by_kind[kind]["rows"] for by_kind in by_rank), strict=True)
        if planned:
            # One micro-batch: weights to the slots once, since they still hold them in backward; a gradient a linear.
            assert all(by_kind[kind]["replicas"] for by_kind in by_rank), kind
            calls = ["prefetch_weights", "reduce_grads", "reduce_grads"]
            assert [by_kind[kind]["calls"] for by_kind in by_rank] == [calls] * len(by_rank)
            assert max(after) < max(before) and sum(after) == sum(before), kind
        else:
            assert all(by_kind[kind]["calls"] == [] and by_kind[kind]["same rows"] for by_kind in by_rank), kind


@pytest.mark.parametrize(
    ("ranks", "slots", "backend", "shape"),
    [
        (2, 1, "sequential", EXACT),
        (4, 2, "sequential", EXACT),
        (2, 2, "grouped", replace(CPU, hidden=16, ffn=8)),
        pytest.param(4, 1, "sequential", EXACT, marks=pytest.mark.slow),
        pytest.param(4, 1, "grouped", replace(CPU, hidden=16, ffn=8), marks=pytest.mark.slow),
        pytest.param(3, 2, "sequential", replace(EXACT, experts=6), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "dtype", value),
)
def test_output_and_gradients_are_those_without_them(ranks: int, slots: int, backend: str, shape: Shape) -> None:
    assert_equal(run_ranks(ranks, compared, shape, slots, backend), shape)
