"""Redundant experts in Megatron's own training: its DDP, optimizers and checkpoints, against the same without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.megatron_training import Job, Setup, on_cpu
from tests.helpers.redundant_layer import watched
from tests.helpers.shapes import Split

PLANS = (("balance_min_rows", 1), ("balance_from_percent", 100))


def with_slots(setup: Setup, slots: int) -> Setup:
    return replace(setup, install=(("redundant_experts", slots), *PLANS))


def train(setup: Setup, steps: int) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], list[str]]:
    """Losses and gradient norms; all weights; the transfers of redundant experts."""
    job = Job(setup)
    with watched() as seen:
        losses = [job.step() for _ in range(steps)]
    return losses, job.weights(), seen.calls


def apart(one: Any, other: Any) -> dict[str, float]:
    """Largest difference of a loss, of a norm (relative), and of a weight."""
    (steps, weights, _), (their_steps, their_weights, _) = one, other
    assert weights.keys() == their_weights.keys()
    return {
        "loss": max(abs(mine[0] - theirs[0]) for mine, theirs in zip(steps, their_steps, strict=True)),
        "norm": max(abs(mine[1] / theirs[1] - 1) for mine, theirs in zip(steps, their_steps, strict=True)),
        "weight": max(float((weights[name] - tensor).abs().max()) for name, tensor in their_weights.items()),
    }


def compared(group: Any, setups: list[Setup], steps: int) -> list[dict[str, Any]]:
    """For each setup and R = 1, 2: what is apart from R = 0 after these steps of 2 micro-batches, EP 2."""
    found = []
    with on_cpu(), process_groups(Split(1, 2)):
        assert parallel_state.get_expert_data_parallel_world_size() == group.size() // 2
        for setup in setups:
            wanted = train(with_slots(setup, 0), steps)
            assert not wanted[2]
            for slots in (1, 2):
                ours = train(with_slots(setup, slots), steps)
                found.append(apart(ours, wanted) | {"transfers": len(ours[2]), "losses": [loss for loss, _ in ours[0]]})
    return found


SETUPS = {
    "ddp": Setup(experts="sequential", distributed=False),
    "grouped, fused": Setup(experts="grouped", distributed=False, fusion=True),
    "distributed optimizer": Setup(experts="grouped", fusion=True),
    "distributed optimizer, overlapped": Setup(experts="sequential", overlap=True),
    "distributed optimizer, overlapped, fused": Setup(experts="grouped", overlap=True, fusion=True),
}


def assert_alike(by_rank: list[list[dict[str, Any]]], steps: int, number: int) -> None:
    for found in by_rank:
        assert len(found) == 2 * number
        for each in found:
            assert each["transfers"] > steps  # of 2 layers and 2 micro-batches some are planned
            assert len({round(loss, 4) for loss in each["losses"]}) > steps // 2  # it trains, on batches of its own
            assert each["loss"] < 1e-5 and each["norm"] < 1e-4 and each["weight"] < 1e-4, each


def test_a_few_steps_without_overlap() -> None:
    assert_alike(run_ranks(2, compared, [SETUPS["grouped, fused"]], 8), 8, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETUPS)
def test_fifty_steps_are_those_without_them(name: str) -> None:
    """Gradient accumulation over 2 micro-batches, clipping, EP 2 x expert data parallel 2."""
    assert_alike(run_ranks(4, compared, [SETUPS[name]], 50), 50, 1)
