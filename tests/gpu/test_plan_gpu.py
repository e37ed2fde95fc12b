"""Training by Megatron's 1F1B plan on GPUs, with its DistributedDataParallel and distributed optimizer: losses, norms
and weights are those without the plan, also where one of its two streams is late."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import megatron_ep_v2
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.megatron.experts import Experts
from megatron_ep_v2.megatron.managers import CompactManager
from megatron_ep_v2.watchdog.watched_buffer import WatchedBuffer
from tests.helpers.carriers import buffer_class, v2_carrier
from tests.helpers.gpu_training import Job
from tests.helpers.graphed_steps import GPU_SHAPE, for_ranks
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.progress import say

RANKS = gpu_ranks()
STEPS, MICRO_BATCHES = 6, 3
PLAN = {"overlap_moe_expert_parallel_comm": True}
DELAYED = PLAN | {"delay_wgrad_compute": True}
LATE = 4_000_000  # cycles, about 2 ms: longer than a layer takes

pytestmark = pytest.mark.usefixtures("transformer_engine")


def repeats(late: str) -> bool:
    """Whether results are compared bit by bit. In deterministic mode selections are sorted on the communication stream:
    no combine there reads those of the compute stream."""
    return late != "communication"


@contextlib.contextmanager
def lagging(stream: str) -> Iterator[None]:
    """compute: delayed weight gradients run late. communication: combines do. Whatever uses memory that has been given
    away by then shows in the results."""
    weight_gradients, combine = Experts.backward_dw, WatchedBuffer.combine

    def late_gradients(self: Experts) -> None:
        torch.cuda._sleep(LATE)
        weight_gradients(self)

    def late_combine(self: WatchedBuffer, *args: Any, **more: Any) -> Any:
        torch.cuda._sleep(LATE)
        return combine(self, *args, **more)

    late = (Experts, "backward_dw", late_gradients) if stream == "compute" else (WatchedBuffer, "combine", late_combine)
    with mock.patch.object(*late) if stream else contextlib.nullcontext():
        yield


@isolated
def train(group: Any, fields: dict[str, Any], mode: dict[str, Any], starts: bool, late: str) -> dict[str, Any]:
    """Losses, norms and weights of STEPS steps with settings of `install()`.

    Args:
        starts: Dispatches are only started, where the buffer can.
        late: See `lagging`.
    """
    shape = for_ranks(GPU_SHAPE, group.size())
    with process_groups(), lagging(late):
        megatron_ep_v2.install(
            buffer=v2_carrier(),
            num_max_tokens_per_rank=shape.seq_length,
            experts="grouped",
            deterministic=repeats(late),
            **mode,
        )
        job = Job(shape, fields, group.rank(), group.size(), MICRO_BATCHES)
        for module in job.model.modules():
            manager = getattr(getattr(module, "token_dispatcher", None), "_comm_manager", None)
            if isinstance(manager, CompactManager):
                manager.starts = starts
        losses: list[float] = []
        norms: list[float] = []
        for number in range(STEPS):
            say(f"{fields}, {mode}, started {starts}, late {late}: step {number}", group)
            loss, norm = job.step(number)
            losses += [value.item() for value in loss]
            norms.append(norm)
        weights = job.weights()
        megatron_ep_v2.destroy_buffers()
    return {"losses": losses, "norms": norms, "weights": weights}


@functools.cache
def without_plan(mode: tuple[tuple[str, Any], ...], late: str) -> list[dict[str, Any]]:
    return run_ranks(RANKS, train, {}, dict(mode), False, late, backend="nccl")


EXPANDED = (("layout", "expanded"),)
SYNC_FREE = (("sync_free", True), ("sync_free_rows_percent", 0))


@pytest.mark.parametrize(
    ("fields", "mode", "starts", "late"),
    [
        *((PLAN, EXPANDED, False, late) for late in ("", "communication")),  # it delays no weight gradients
        *((DELAYED, EXPANDED, False, late) for late in ("", "compute", "communication")),
        *((DELAYED, EXPANDED, True, late) for late in ("", "compute", "communication")),
        *((DELAYED, SYNC_FREE, False, late) for late in ("", "compute", "communication")),
    ],
)
def test_training_by_the_plan_is_training_without_it(
    fields: dict[str, Any], mode: tuple[tuple[str, Any], ...], starts: bool, late: str
) -> None:
    if starts and not buffer_class(v2_carrier()).defers:
        pytest.skip(f"{v2_carrier()} cannot start a call: DeepEP 2.5 can")
    wanted = without_plan(mode, "" if repeats(late) else late)
    ours = run_ranks(RANKS, train, fields, dict(mode), starts, late, backend="nccl")
    for found, without in zip(ours, wanted, strict=True):
        if repeats(late):
            assert found["losses"] == without["losses"] and found["norms"] == without["norms"]
            assert all(torch.equal(found["weights"][name], value) for name, value in without["weights"].items())
        else:  # another order of sums, in bf16
            losses = zip(found["losses"], without["losses"], strict=True)
            norms = zip(found["norms"], without["norms"], strict=True)
            assert all(abs(mine - theirs) < 2e-2 * theirs for mine, theirs in losses)
            assert all(abs(mine - theirs) < 5e-2 * theirs for mine, theirs in norms)
