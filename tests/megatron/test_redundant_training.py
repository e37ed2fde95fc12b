"""Redundant experts in Megatron's own training: its DDP, optimizers and checkpoints, against the same without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch.distributed.checkpoint import FileSystemReader

from megatron_ep_v2.experts.redundant import run_with_replicas
from megatron_ep_v2.megatron.experts import Experts
from tests.helpers.compare import worst
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.megatron_training import Job, Setup, on_cpu
from tests.helpers.redundant_layer import watched
from tests.helpers.shapes import Split
from tests.helpers.stacks import on_one_stack

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
        "loss": worst(abs(mine[0] - theirs[0]) for mine, theirs in zip(steps, their_steps, strict=True)),
        "norm": worst(abs(mine[1] / theirs[1] - 1) for mine, theirs in zip(steps, their_steps, strict=True)),
        "weight": worst(float((weights[name] - tensor).abs().max()) for name, tensor in their_weights.items()),
    }


def compared(group: Any, setups: list[Setup], steps: int, numbers: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """For each setup and number of slots: what is apart from no slots after these steps of 2 micro-batches, EP 2."""
    found = []
    with on_cpu(), process_groups(Split(1, 2)):
        assert parallel_state.get_expert_data_parallel_world_size() == group.size() // 2
        for setup in setups:
            wanted = train(with_slots(setup, 0), steps)
            assert not wanted[2]
            for slots in numbers:
                ours = train(with_slots(setup, slots), steps)
                found.append(apart(ours, wanted) | {"transfers": len(ours[2]), "losses": [loss for loss, _ in ours[0]]})
    return found


SETUPS = {
    "ddp": Setup(experts="sequential", distributed=False),
    "grouped, fused": Setup(experts="grouped", distributed=False, fusion=True),
    "distributed optimizer": Setup(experts="grouped", fusion=True),
    "overlapped": Setup(experts="sequential", overlap=True),
    "overlapped, fused": Setup(experts="grouped", overlap=True, fusion=True),
}


STEPS = 6


def assert_alike(by_rank: list[list[dict[str, Any]]], steps: int, number: int) -> None:
    for found in by_rank:
        assert len(found) == number
        for each in found:
            assert each["transfers"] > steps  # of 2 layers and 2 micro-batches some are planned
            assert len({round(loss, 4) for loss in each["losses"]}) > steps // 2  # it trains, on batches of its own
            assert each["loss"] < 1e-5 and each["norm"] < 1e-4 and each["weight"] < 1e-4, each


@pytest.mark.slow
def test_a_few_steps_without_data_parallelism() -> None:
    assert_alike(run_ranks(2, compared, [SETUPS["grouped, fused"]], STEPS), STEPS, 2)


@pytest.mark.slow
def test_a_few_steps_are_those_without_them() -> None:
    """Gradient accumulation over 2 micro-batches, clipping, EP 2 x expert data parallel 2."""
    setups = [SETUPS[name] for name in ("ddp", "overlapped", "overlapped, fused")]
    assert_alike(run_ranks(4, compared, setups, STEPS), STEPS, 6)


@pytest.mark.slow
@on_one_stack
def test_fifty_steps_are_those_without_them() -> None:
    """Nothing adds up over many of them."""
    assert_alike(run_ranks(4, compared, [SETUPS["overlapped, fused"]], 50, (2,)), 50, 1)


def not_gathered(group: Any) -> dict[str, float]:
    """The control of the overlapped gather: weights go to other ranks before DDP's hooks have gathered them."""

    def at_once(self: Experts, rows: Any, probs: Any, groups: Any, replicas: Any) -> torch.Tensor:
        linears = self.linear_fc1, self.linear_fc2
        return run_with_replicas(rows, probs, *linears, groups, replicas, self.backend, self.recompute_activation)

    setup = SETUPS["overlapped"]
    with on_cpu(), process_groups(Split(1, 2)), pytest.MonkeyPatch.context() as patch:
        wanted = train(with_slots(setup, 0), 4)
        patch.setattr(Experts, "_with_replicas", at_once)
        return apart(train(with_slots(setup, 2), 4), wanted)


@pytest.mark.slow
def test_weights_that_are_not_gathered_before_they_are_sent_are_seen() -> None:
    assert max(found["weight"] for found in run_ranks(4, not_gathered)) > 1e-4


def checkpointed(group: Any, folder: Path) -> dict[str, Any]:
    """A job with replica slots saves, one without continues, and the other way round."""
    found: dict[str, Any] = {}
    with on_cpu(), process_groups(Split(1, 2)):
        for slots, others in ((2, 0), (0, 2)):
            job = Job(with_slots(SETUPS["distributed optimizer"], slots))
            for _ in range(2):
                job.step()
            found[f"parameters {slots}"] = sorted(name for name, _ in job.model.named_parameters())
            found[f"keys {slots}"] = sorted(job.state()["model"])
            job.save(folder / str(slots))
            wanted = [job.step() for _ in range(2)]
            other = Job(with_slots(SETUPS["distributed optimizer"], others))
            other.load(folder / str(slots))
            found[f"to {others}"] = [
                worst(abs(a - b) for a, b in zip(*pair, strict=True))
                for pair in zip([other.step() for _ in range(2)], wanted, strict=True)
            ]
        for slots in (0, 2):
            metadata = FileSystemReader(folder / str(slots)).read_metadata().state_dict_metadata
            found[f"stored {slots}"] = sorted(metadata)
    return found


@pytest.mark.slow
def test_checkpoints_are_the_same_and_continue_each_other(tmp_path: Path) -> None:
    for found in run_ranks(2, checkpointed, tmp_path):
        for what in ("parameters", "keys", "stored"):
            assert found[f"{what} 0"] == found[f"{what} 2"] and len(found[f"{what} 0"]) > 10
        assert worst([*found["to 0"], *found["to 2"]]) < 1e-6  # gradients that get lost change more
