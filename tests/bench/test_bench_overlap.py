"""`bench --step --overlap`: rows with shared experts next to communication, on the CPU's one stream."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from megatron_ep_v2.bench.entry import entries_of
from megatron_ep_v2.bench.layer import Groups
from megatron_ep_v2.bench.progress import Progress
from megatron_ep_v2.bench.shapes import TINY
from megatron_ep_v2.bench.step.measure import Stepper, measure_steps
from megatron_ep_v2.bench.step.model import model_options
from megatron_ep_v2.bench.variants import VARIANTS
from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.cli.bench_options import parse
from megatron_ep_v2.megatron.experts import Experts
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer
from megatron_ep_v2.megatron.standalone import model_parallel, on_cpu
from tests.bench.test_bench import bench
from tests.helpers.carriers import buffer_class
from tests.helpers.compare import worst
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.shared_expert import shared_expert_on_the_cpu, with_overlap

NAMES = ["alltoall", "reference-compact", "reference-expanded"]
SHARED_FFN = 96


def steps_of(group: Any, names: list[str]) -> list[dict[str, Any]]:
    """Rows of two layers, on the CPU."""
    shape = replace(TINY, shared_ffn=SHARED_FFN)
    with on_cpu(), shared_expert_on_the_cpu(), model_parallel(group.size(), 0):
        options = model_options(
            shape,
            layers=2,
            tokens=24,
            vocab_size=64,
            micro_batches=1,
            dtype="fp32",
            recompute=False,
            ranks=group.size(),
            seed=0,
            experts="sequential",
            overlap=True,
        )
        trainer = Trainer(options, torch.device("cpu"))
        variants = [each for name in names for each in VARIANTS[name].with_overlap(False)]
        entries = entries_of(variants, (None,), ("sequential",))
        return measure_steps(entries, shape, trainer, 2, Groups(), Progress(1, silent=True))


@isolated
def rows_of_steps(group: Any) -> tuple[list[dict[str, Any]], dict[str, set[tuple[int, int]]]]:
    """The rows; and by variant what its steps have done: shared experts run by the dispatcher, dispatches started."""
    seen: Counter[str] = Counter()
    done: dict[str, set[tuple[int, int]]] = {}
    own_step, run, started = Stepper.step, SharedExpertMLP.pre_forward_comm, ReferenceBuffer.start_dispatch

    def step(stepper: Stepper) -> Any:
        seen.clear()
        stats = own_step(stepper)
        done.setdefault(stepper.dispatchers.variant.name, set()).add((seen["by the dispatcher"], seen["started"]))
        return stats

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **arguments: Any) -> Any:
            seen[name] += 1
            return function(*args, **arguments)

        return call

    with (
        mock.patch.object(Stepper, "step", step),
        mock.patch.object(SharedExpertMLP, "pre_forward_comm", noted("by the dispatcher", run)),
        mock.patch.object(ReferenceBuffer, "start_dispatch", noted("started", started)),
    ):
        rows = steps_of(group, NAMES)
    return rows, done


@with_overlap
@pytest.mark.slow
def test_steps_with_shared_experts_next_to_communication() -> None:
    rows, done = run_ranks(2, rows_of_steps)[0]
    wanted = [(name, kind) for name in NAMES[:2] for kind in ("", "+overlap")]
    wanted += [(NAMES[2], kind) for kind in ("", "+waiting-overlap", "+overlap")]
    assert [row["variant"] for row in rows] == [name + kind for name, kind in wanted]
    for row, (_, kind) in zip(rows, wanted, strict=True):
        assert row["status"] == "ok", row["reason"]
        assert row["step_ms"] > 0 and row["overlap"] == bool(kind) and row["shared_expert_ffn"] == SHARED_FFN
        assert worst(row["relative_l2"].values()) < 1e-5  # loss and gradient norm, against alltoall without overlap
    layers, backwards = 2, 2  # a combine's backward is a dispatch
    assert done == {
        name + kind: {(layers if kind else 0, layers * backwards if name + kind == f"{NAMES[2]}+overlap" else 0)}
        for name, kind in wanted
    }


@isolated
def rows_after_a_failure(group: Any) -> dict[str, str]:
    """By variant, why it is not ok, where the experts of one raise while the shared expert is under way."""
    own_enter, own_forward, entered = Stepper.enter, Experts.forward, [""]

    def enter(stepper: Stepper, *watch: Any) -> None:
        entered[0] = stepper.dispatchers.variant.name
        own_enter(stepper, *watch)

    def forward(experts: Experts, *given: Any) -> Any:
        if entered[0] == "alltoall+overlap":
            raise RuntimeError("these experts cannot run here")
        return own_forward(experts, *given)

    with mock.patch.object(Stepper, "enter", enter), mock.patch.object(Experts, "forward", forward):
        return {row["variant"]: row["reason"] for row in steps_of(group, ["alltoall", NAMES[2]])}


@with_overlap
@pytest.mark.slow
def test_a_variant_that_fails_in_between_spoils_no_other() -> None:
    reasons = run_ranks(2, rows_after_a_failure)[0]
    assert "these experts cannot run here" in reasons.pop("alltoall+overlap")
    assert reasons == dict.fromkeys(["alltoall", NAMES[2], f"{NAMES[2]}+waiting-overlap", f"{NAMES[2]}+overlap"], "")


@isolated
def status_by_variant(group: Any) -> dict[str, tuple[str, str]]:
    return {row["variant"]: (row["status"], row["reason"]) for row in steps_of(group, ["alltoall", NAMES[1]])}


@pytest.mark.skipif(not with_overlap.args[0], reason="this Megatron-Core can do it with the flex dispatcher, too")
@pytest.mark.slow
def test_before_0_19_alltoall_alone_can_overlap() -> None:
    found = run_ranks(2, status_by_variant)[0]
    status, reason = found.pop(f"{NAMES[1]}+overlap")
    assert status == "unavailable" and "only works with alltoall" in reason
    assert found == dict.fromkeys(["alltoall", "alltoall+overlap", NAMES[1]], ("ok", ""))


def test_which_variants_can_overlap() -> None:
    def names(name: str, recompute: bool = False) -> list[str]:
        return [variant.name for variant in VARIANTS[name].with_overlap(recompute)]

    assert names("allgather") == ["allgather"] and names("raw-expanded") == ["raw-expanded"]
    assert names("sync-free+graph") == ["sync-free+graph"]
    assert names("expanded") == ["expanded", "expanded+overlap"]  # DeepEP 2.1 starts nothing
    assert names("ep-compact") == ["ep-compact", "ep-compact+overlap"]
    assert names("ep-expanded") == ["ep-expanded", "ep-expanded+waiting-overlap", "ep-expanded+overlap"]
    assert names("ep-expanded", recompute=True) == ["ep-expanded", "ep-expanded+overlap"]  # a checkpoint starts nothing


def test_the_table_of_carriers_says_which_buffer_starts_calls() -> None:
    for carrier in CARRIERS.values():
        assert buffer_class(carrier.name).defers == carrier.starts_calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overlap"], "whole training steps: --step or --tune"),
        (["--shared-expert-ffn", "64"], "whole training steps: --step or --tune"),
        (["--step", "--overlap", "--redundant-experts", "1"], "--overlap takes no --redundant-experts"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_what_cannot_overlap_is_refused() -> None:
    done = bench("--step", "--overlap", ranks=0)
    assert done.returncode == 2 and "add --shared-expert-ffn" in done.stderr
    done = bench("--step", "--overlap", "--shapes", "deepseek-v3", ranks=0)
    assert done.returncode == 2 and "a CUDA stream" in done.stderr
