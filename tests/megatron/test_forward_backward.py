"""A step that overflows in sync-free mode runs again inside Megatron's own schedules: bit for bit as with unlimited
room, on all ranks of the model, whatever Megatron accumulates in a step."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_ep_v2 import sync_free
from megatron_ep_v2.megatron import expert_load, step_state
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.megatron_training import Job, Setup, on_cpu
from tests.helpers.reports import log_records
from tests.helpers.shapes import Split

SYNC_FREE = {"MCORE_DEEPEP_V2_SYNC_FREE": "1"}
# Everything that a router accumulates in its forwards, and random numbers.
ROUTER = (
    ("moe_router_score_function", "sigmoid"),
    ("moe_router_enable_expert_bias", True),
    ("moe_router_bias_update_rate", 0.1),
    ("moe_router_load_balancing_type", ["aux_loss", "global_aux_loss"]),
    ("moe_aux_loss_coeff", [0.01, 0.01]),
    ("moe_z_loss_coeff", 0.001),
    ("moe_input_jitter_eps", 0.1),
)


@contextlib.contextmanager
def room_for(percent: int) -> Iterator[None]:
    with mock.patch.dict("os.environ", MCORE_DEEPEP_V2_SYNC_FREE_ROWS_PERCENT=str(percent)):
        yield


class Batches:
    """An endless iterator of micro-batches, different on every rank."""

    def __init__(self) -> None:
        self.taken = 0

    def __next__(self) -> dict[str, torch.Tensor]:
        self.taken += 1
        generator = torch.Generator().manual_seed(100 * self.taken + dist.get_rank())
        return {"tokens": torch.randint(256, (2, 13), generator=generator)}


class Skewed:
    """Routers whose tokens all go to three experts, on ranks 2 and 3, while `on`. Counts the forwards of one router."""

    def __init__(self, job: Job, world: Any):
        self.on, self.forwards = False, 0
        self._far = world.rank() > 1
        routers = [module for name, module in job.model.named_modules() if name.endswith(".router")]
        assert len(routers) == 2
        for router in routers:  # after DDP's hooks, which may gather the weight
            router.register_forward_pre_hook(self._skew)
        routers[0].register_forward_pre_hook(self._count)

    def _skew(self, router: torch.nn.Module, *_: Any) -> None:
        if self._far:
            router.expert_bias.copy_(torch.tensor([float(self.on)] * 3 + [0.0] * 5))

    def _count(self, *_: Any) -> None:
        self.forwards += 1


def logged() -> dict[str, torch.Tensor]:
    """What Megatron has summed up for its log."""
    found: dict[str, torch.Tensor] = {}
    for module, name in step_state._LOGS:
        found |= step_state._tensors(getattr(sys.modules.get(module), name, None), name)
    return found


def train(world: Any, percent: int, micro_batches: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Three steps. On ranks 2 and 3, which alone have a limit, the first and the last have more rows than room."""
    limited = bool(percent) and world.rank() > 1
    with room_for(percent if limited else 0), on_cpu(), process_groups(Split(1, 2)), log_records() as records:
        torch.manual_seed(world.rank())
        job = Job(Setup(experts="grouped", **fields))
        batches, skewed, losses, norms = Batches(), Skewed(job, world), [], []
        expert_load.local_expert_load()
        for value in logged().values():  # as Megatron's loop does when it has logged them
            value.zero_()
        for n in range(3):
            skewed.on = n != 1
            loss, norm = job.scheduled_step(iter_of(batches), micro_batches)
            losses, norms = losses + loss, [*norms, norm]
            if limited:
                sync_free.fit(0)
        return {
            "losses": losses,
            "norms": norms,
            "weights": job.weights(),
            "buffers": dict(job.model.named_buffers()),
            "logged": logged(),
            "loads": expert_load.local_expert_load()[-2:],
            "random": torch.rand(3),
            "taken": batches.taken,
            "runs": skewed.forwards // micro_batches,
            "said": [
                line for r in records if "runs again" in (line := r.getMessage()) and r.levelno == logging.WARNING
            ],
        }


def iter_of(batches: Batches) -> Iterator[Any]:
    while True:
        yield next(batches)


def assert_equal(found: Any, wanted: Any, where: str = "") -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_equal(one, other, f"{where}[{i}]")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    else:
        assert found == wanted, where


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro_batches", "distributed", "overlap"),
    [(1, False, False), (2, False, True), (2, True, False), (8, True, True)],
)
def test_a_repeated_step_equals_one_with_unlimited_room(micro_batches: int, distributed: bool, overlap: bool) -> None:
    fields = {"distributed": distributed, "overlap": overlap, "more": ROUTER}
    wanted = run_ranks(4, train, 0, micro_batches, fields, env=SYNC_FREE)
    for rank, (found, unlimited) in enumerate(
        zip(run_ranks(4, train, 190, micro_batches, fields, env=SYNC_FREE), wanted, strict=True)
    ):
        said = found.pop("said")
        assert unlimited.pop("said") == []
        assert (found.pop("runs"), unlimited.pop("runs")) == (5, 3), "the first and the last step ran twice"
        assert found["taken"] == 3 * micro_batches
        assert len(said) == (2 if rank == 2 else 0), said
        assert all("a step runs again, because" in line and "percent now" in line for line in said)
        assert len(found["logged"]) >= 3 and all(value.any() for value in found["logged"].values())
        assert any("expert_bias" in name for name in found["buffers"])
        assert_equal(found, unlimited, f"rank {rank}")
