"""MoE layers that dispatch through another dispatcher while this package is installed: what `status()` says, and the
warning at the first training step; and where there is nothing to warn about."""

from __future__ import annotations

import gc
import logging
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

import megatron_ep_v2
from megatron_ep_v2.megatron import dispatchers, managers, optimizer_step
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups, transformer_config
from tests.helpers.megatron_training import Job, Setup, on_cpu
from tests.helpers.reports import log_records
from tests.helpers.shapes import CPU, Split

SAYS = "megatron_ep_v2 is installed, but no MoE layer dispatches through it: "
NEEDED = "moe_token_dispatcher_type=flex and moe_flex_dispatcher_backend=deepep"
NONE = "none with anything to dispatch was built since it was installed"
BUILT = "moe_token_dispatcher_type={}"


def take(records: list[logging.LogRecord]) -> list[str]:
    """What this package has warned of in layers that do not dispatch, since the last call."""
    said = [record.getMessage() for record in records if record.levelno == logging.WARNING]
    records.clear()
    return [message for message in said if "no MoE layer" in message]


def forget_models() -> None:
    """Those that an earlier test left in this process: hooks of Megatron's DDP keep them for good."""
    managers.managers.clear()
    dispatchers.forget()


def dispatcher(kind: str, backend: str = "deepep", ranks: int = 2) -> Any:
    """One of Megatron's dispatchers, as MoELayer builds it."""
    classes = {
        "allgather": token_dispatcher.MoEAllGatherTokenDispatcher,
        "alltoall": token_dispatcher.MoEAlltoAllTokenDispatcher,
        "flex": token_dispatcher.MoEFlexTokenDispatcher,
    }
    config = transformer_config(CPU, Split(1, ranks), moe_token_dispatcher_type=kind)
    config.moe_flex_dispatcher_backend = backend  # Megatron's own checks want its library
    local = CPU.experts // ranks
    return classes[kind](local, list(range(local)), config, get_default_pg_collection())


# The layers of a job -> whether its first step warns, and what status() says.
JOBS: dict[str, tuple[list[tuple[str, str]], bool, str]] = {
    "dense": ([], False, NONE),
    "alltoall": (
        [("alltoall", "deepep")] * 2,
        True,
        f"no MoE layer dispatches through it: 2 built with {BUILT.format('alltoall')}",
    ),
    "allgather": (
        [("allgather", "deepep")],
        True,
        f"no MoE layer dispatches through it: 1 built with {BUILT.format('allgather')}",
    ),
    "flex": ([("flex", "deepep")] * 3, False, "3 dispatch through it"),
    "another backend": (
        [("flex", "hybridep")],
        False,
        f"no MoE layer dispatches through it: 1 built with {BUILT.format('flex')}, "
        f"moe_flex_dispatcher_backend=hybridep ({__name__}.Manager)",
    ),
    "some": (
        [("flex", "deepep"), ("alltoall", "deepep")],
        False,
        f"1 dispatch through it; others do not: 1 built with {BUILT.format('alltoall')}",
    ),
}


class Manager:
    """Stands for that of a backend whose library is not here."""

    def __init__(self, **_: Any):
        pass


def step_with_each(group: Any) -> dict[str, Any]:
    """For each of JOBS: what the first and the second training step warn of, and the status after them."""
    forget_models()
    found = {}
    step = mock.Mock(return_value="stepped")
    with (
        on_cpu(),
        process_groups(Split(1, 2)),
        log_records() as seen,
        mock.patch.object(token_dispatcher, "_HybridEPManager", Manager),
    ):
        for name, (layers, _, _) in JOBS.items():
            gc.collect()  # what the job before left in reference cycles
            megatron_ep_v2.install(buffer="reference")
            kept = [dispatcher(*layer) for layer in layers]
            bound = optimizer_step.deciding_first(step)
            assert bound() == "stepped"
            first = take(seen)
            megatron_ep_v2.install(buffer="reference", num_sms=4)  # does not forget what was built before
            assert bound() == "stepped"
            again, status = take(seen), megatron_ep_v2.status()["moe_layers"]
            bound()
            found[name] = (first, again, take(seen), status, len(kept))
            del kept
            megatron_ep_v2.uninstall()
        megatron_ep_v2.install(buffer="reference")
        kept = [dispatcher("alltoall")]
        with mock.patch.object(parallel_state, "get_expert_data_parallel_rank", lambda: 1):
            optimizer_step.deciding_first(step)()
        found["of another replica"] = take(seen)
        megatron_ep_v2.uninstall()
        optimizer_step.deciding_first(step)()
        megatron_ep_v2.install(buffer="reference")
        optimizer_step.deciding_first(step)()
        found["uninstalled"] = (take(seen), megatron_ep_v2.status()["moe_layers"], len(kept))
        kept = [dispatcher("alltoall")]
        optimizer_step.deciding_first(step)()
        found["after a dense model's steps"] = take(seen)
    return found


def test_the_first_step_warns_where_none_dispatches_and_one_was_meant_to() -> None:
    first_rank, second_rank = run_ranks(2, step_with_each)
    for ranks in (first_rank, second_rank):
        assert ranks.pop("of another replica") == []
        assert ranks.pop("uninstalled") == ([], NONE, 1), "what was built before is not asked about"
    assert len(first_rank.pop("after a dense model's steps")) == 1, "as of a critic that trains before its actor"
    assert second_rank.pop("after a dense model's steps") == []
    for name, (layers, warns, status) in JOBS.items():
        said = [f"{SAYS}{status.partition(': ')[2]}; needed before the model is built: {NEEDED}"] if warns else []
        assert first_rank[name] == (said, said, [], status, len(layers)), name
        assert second_rank[name] == ([], [], [], status, len(layers)), "one rank of a stage speaks"


def train_alone(group: Any) -> tuple[list[str], str]:
    """Experts on one rank have nothing to dispatch, whatever Megatron calls it."""
    forget_models()
    with on_cpu(), process_groups(Split(1, 1)), log_records() as seen:
        job = Job(Setup(distributed=False))
        job.step()
        return take(seen), megatron_ep_v2.status()["moe_layers"]


def test_one_rank_has_nothing_to_dispatch() -> None:
    assert run_ranks(1, train_alone) == [([], NONE)]


def step_of_megatrons_optimizer(group: Any) -> list[list[str]]:
    """Megatron's own optimizer, as all frameworks make it: what two steps warn of."""
    forget_models()
    with on_cpu(), process_groups(Split(1, 2)), log_records() as seen:
        megatron_ep_v2.install(buffer="reference")
        kept = dispatcher("alltoall")
        model = torch.nn.Linear(2, 2)
        config = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=False, fp16=False, clip_grad=0.0)
        ddp = DistributedDataParallel(kept.config, DistributedDataParallelConfig(), model)
        optimizer = get_megatron_optimizer(config, [ddp])
        said = []
        for _ in range(2):
            ddp.zero_grad_buffer()
            ddp(torch.ones(1, 2)).sum().backward()
            assert optimizer.step()[0]
            said.append(take(seen))
        return said


def test_megatrons_own_optimizer_warns_once() -> None:
    (first, second), others = run_ranks(2, step_of_megatrons_optimizer)
    assert len(first) == 1 and "1 built with moe_token_dispatcher_type=alltoall" in first[0] and second == []
    assert others == [[], []]
