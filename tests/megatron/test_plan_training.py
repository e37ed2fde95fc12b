"""Training by Megatron's 1F1B plan as megatron.training sets it up: its schedule, its DistributedDataParallel with
overlapped communication and its distributed optimizer, weight gradients delayed or not. Losses, norms and weights are
those of the same steps without the plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_ep_v2.megatron.managers import CompactManager
from tests.helpers.compare import relative_error
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.megatron_training import Job, Setup, on_cpu
from tests.helpers.one_memory import in_one_memory
from tests.helpers.shapes import Split
from tests.megatron.test_forward_backward import Batches, iter_of
from tests.megatron.test_overlap import plan_on_the_cpu

RANKS, STEPS, MICRO_BATCHES = 4, 4, 3
PLAN = (("overlap_moe_expert_parallel_comm", True), ("bf16", True), ("params_dtype", torch.float32))
DELAYED = (*PLAN, ("delay_wgrad_compute", True))


def forward_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """As Megatron-LM's pretrain_gpt.py has it."""
    tokens = next(data_iterator)["tokens"]
    positions, labels = torch.arange(12).expand(len(tokens), 12), tokens[:, 1:].contiguous()
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(tokens[:, :-1], positions, attention_mask=None, labels=labels)
    return output, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})


@contextlib.contextmanager
def plan() -> Iterator[None]:
    with plan_on_the_cpu(), pytest.MonkeyPatch.context() as patch:
        # Of modules without one, as linears are where TransformerEngine is not installed.
        patch.setattr(torch.nn.Module, "backward_dw", lambda _: None, raising=False)
        yield


def train(
    world: Any, fields: tuple[tuple[str, Any], ...], experts: str, layout: str, starts: bool = False
) -> dict[str, Any]:
    """STEPS steps of two expert-parallel groups of two ranks.

    Args:
        fields: PLAN, DELAYED or none, of the model's configuration.
        starts: Dispatches are only started, as on DeepEP 2.5.
    """
    mode = ("sync_free", True) if layout == "sync-free" else ("layout", layout)
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_cpu())
        stack.enter_context(process_groups(Split(1, 2)))
        if fields:
            stack.enter_context(plan())
        started = stack.enter_context(in_one_memory()) if starts else []
        torch.manual_seed(world.rank())
        job = Job(Setup(experts=experts, overlap=True, more=fields, install=(mode,)))
        for module in job.model.modules():
            manager = getattr(getattr(module, "token_dispatcher", None), "_comm_manager", None)
            if isinstance(manager, CompactManager):
                manager.starts = starts
        batches, losses, norms = Batches(), [], []
        for _ in range(STEPS):
            loss, norm = job.scheduled_step(iter_of(batches), MICRO_BATCHES, forward_step=forward_step)
            losses, norms = losses + loss, [*norms, norm]
        return {
            "losses": torch.tensor(losses),
            "norms": torch.tensor(norms),
            **job.weights(),
            "started": torch.tensor(float(started.count("dispatch starts"))),
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "experts", "layout", "starts"),
    [
        (PLAN, "grouped", "expanded", False),
        (DELAYED, "grouped", "expanded", False),
        (DELAYED, "grouped", "expanded", True),
        (DELAYED, "sequential", "expanded", True),
        (DELAYED, "grouped", "sync-free", False),
        (PLAN, "megatron", "expanded", False),
    ],
)
def test_training_by_the_plan_is_training_without_it(
    fields: tuple[tuple[str, Any], ...], experts: str, layout: str, starts: bool
) -> None:
    wanted = run_ranks(RANKS, train, (), experts, layout)
    for found, eager in zip(run_ranks(RANKS, train, fields, experts, layout, starts), wanted, strict=True):
        assert found.pop("started") == (2 * STEPS * MICRO_BATCHES if starts else 0)
        assert eager.pop("started") == 0
        errors = {name: relative_error(found[name], value) for name, value in eager.items()}
        assert all(error < 1e-6 for error in errors.values()), errors  # also if one is NaN
