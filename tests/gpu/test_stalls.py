"""The watchdog on GPUs: a rank that is late to each kind of call, one that exits, one that goes another way.

MCORE_DEEPEP_V2_TEST_ROUNDS and MCORE_DEEPEP_V2_TEST_FRESH_ROUNDS set how often each stall is repeated: within one
process group (5, 4 s each), and in new processes (2, about 10 s each; the first compiles). A full record takes 20.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import GroupMismatchError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.watchdog.completion import GpuClock
from megatron_ep_v2.watchdog.stragglers import Arrival
from tests.helpers.carriers import v2_carrier
from tests.helpers.harness import RanksError, isolated, run_ranks
from tests.helpers.progress import say
from tests.helpers.stalls import HEAD, standard_error_in

RANKS, CULPRIT = min(4, gpu_ranks()), 1
HIDDEN, TOPK, TOKENS = 512, 4, 128
LIMIT, PAUSE = 2, 3.6
ROUNDS = int(os.environ.get("MCORE_DEEPEP_V2_TEST_ROUNDS", "5"))
FRESH_ROUNDS = int(os.environ.get("MCORE_DEEPEP_V2_TEST_FRESH_ROUNDS", "2"))


def start(seconds: int, **more: Any) -> None:
    more = {"num_max_tokens_per_rank": TOKENS, **more}
    settings.activate(settings.resolve(buffer=v2_carrier(), watchdog_secs=seconds, **more))


def oversleep() -> None:
    time.sleep(PAUSE)


def take_another_branch(group: Any) -> None:
    """Past a layer, into a wait that no other rank is in."""
    with contextlib.suppress(RuntimeError):
        group.get_group_store().wait(["never set"], datetime.timedelta(seconds=PAUSE))


class Late(torch.autograd.Function):
    """Identity; this rank is late in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        oversleep()
        return grad


def layer(group: Any, x: torch.Tensor, late: str = "") -> torch.Tensor:
    """late: the call that this rank comes late to."""
    experts = 4 * group.size()
    top = torch.rand(len(x), experts, device="cuda").topk(TOPK, dim=1)
    if late == "forward dispatch":
        oversleep()
    if late == "another branch":
        take_another_branch(group)
    rows, _, row_probs, _, handle = fused_dispatch(x, top.indices, top.values, experts, group, do_expand=True)
    if late == "forward combine":
        oversleep()
    if late == "backward of the dispatch":
        rows = Late.apply(rows)
    y = fused_combine((rows * row_probs[:, None]).bfloat16(), group, handle)[0]
    return Late.apply(y) if late == "backward of the combine" else y


def train_step(group: Any, weight: torch.nn.Parameter, optimizer: Any = None, late: str = "") -> None:
    """Two layers; the culprit is late in the second. The host waits for the GPU only at the end, as in training."""
    y = layer(group, torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16) * weight)
    y = layer(group, y, late)
    y.float().square().mean().backward()
    torch.cuda.synchronize()
    if optimizer is not None:
        optimizer.step()


def make_weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16))


def make_model() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    weight = make_weight()
    return weight, torch.optim.SGD([weight], lr=1e-3)


def compile_kernels(group: Any) -> None:
    """Unwatched: the first calls take longer than this test's limit."""
    start(0)
    train_step(group, make_weight())
    pool.destroy_buffers()


@isolated
def late_rounds(group: Any, late: str, rounds: int, folder: str) -> None:
    with standard_error_in(Path(folder, str(group.rank()))):
        compile_kernels(group)
        start(LIMIT)
        model = make_model()
        train_step(group, *model)
        for _ in range(rounds):
            train_step(group, *model, late if group.rank() == CULPRIT else "")
        pool.destroy_buffers()


# The call that the others wait in -> where the late rank is. The number of a layer's MoE call is that of its dispatch.
WHERE = {
    "forward dispatch": "after forward combine (step {step}, MoE call 1,",
    "forward combine": "after forward dispatch (step {step}, MoE call 2,",
    "backward of the combine": "after forward combine (step {step}, MoE call 2,",
    "backward of the dispatch": "after backward of the combine (step {step}, MoE call 2,",
}


@pytest.mark.parametrize("late", [*WHERE, "another branch"])
def test_a_late_rank_is_named_with_its_last_call(late: str, tmp_path: Path) -> None:
    say(f"late to {late}: {ROUNDS} rounds of {PAUSE} s")
    run_ranks(RANKS, late_rounds, late, ROUNDS, str(tmp_path), backend="nccl")
    function = "in take_another_branch" if late == "another branch" else "in oversleep"
    call = "forward dispatch" if late == "another branch" else late
    for rank in set(range(RANKS)) - {CULPRIT}:
        text = Path(tmp_path, str(rank)).read_text()
        reports = [part for part in text.split(HEAD) if "has not finished" in part]
        assert len(reports) == ROUNDS and text.count("goes on after") == ROUNDS, text
        for step, report in enumerate(reports, 2):
            assert f": {call} has not finished for" in report and f"(step {step}, MoE call 2," in report, report
            assert f"rank {CULPRIT} has not arrived" in report and WHERE[call].format(step=step) in report, report
            assert function in report, report
    assert HEAD not in Path(tmp_path, str(CULPRIT)).read_text()


@isolated
def mismatch_rounds(group: Any, rounds: int) -> list[str]:
    answers = []
    for _ in range(rounds):
        start(LIMIT, num_max_tokens_per_rank=512 if group.rank() == CULPRIT else 256)
        try:
            layer(group, torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16))
        except GroupMismatchError as error:
            answers.append(str(error))
    return answers


def test_another_capacity_is_named_on_every_rank() -> None:
    for answers in run_ranks(RANKS, mismatch_rounds, ROUNDS, backend="nccl"):
        assert len(answers) == ROUNDS
        assert all(f"num_max_tokens_per_rank: rank {CULPRIT} has 512" in answer for answer in answers)


@isolated
def undisturbed(group: Any, folder: str) -> int:
    with standard_error_in(Path(folder, str(group.rank()))):
        compile_kernels(group)
        start(1)
        model = make_model()
        for step in range(200):
            train_step(group, *model)
            if step == 100:
                time.sleep(2.5)  # all of them, between calls
        calls = pool.find(group).watch.number  # type: ignore[union-attr]
        pool.destroy_buffers()
    return calls


def test_no_report_of_a_run_in_which_no_rank_is_late(tmp_path: Path) -> None:
    assert run_ranks(RANKS, undisturbed, str(tmp_path), backend="nccl") == [200 * 8] * RANKS
    assert [HEAD in file.read_text() for file in tmp_path.iterdir()] == [False] * RANKS


@isolated
def straggle(group: Any) -> list[Arrival]:
    """The culprit's host is as quick as the others': its GPU is not. Ten of these dispatches are timed."""
    compile_kernels(group)
    start(LIMIT)
    for _ in range(10 * GpuClock.every):
        if group.rank() == CULPRIT:
            torch.cuda._sleep(40_000_000)  # cycles: some 20 ms
        layer(group, torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16))
    return list(megatron_ep_v2.stragglers().arrivals)


def test_stragglers_by_the_clock_of_the_gpu() -> None:
    for arrivals in run_ranks(RANKS, straggle, backend="nccl"):
        assert sum(one.times_last for one in arrivals) == 10, arrivals
        assert arrivals[0].rank == CULPRIT and arrivals[0].times_last >= 8 and arrivals[0].median_ms > 3, arrivals


@isolated
def fresh_round(group: Any, how: str, first: bool, folder: str) -> None:
    """first: kernels may have to be compiled. Without an optimizer: making one imports seconds of torch."""
    with standard_error_in(Path(folder, str(group.rank()))):
        if first:
            compile_kernels(group)
        start(LIMIT)
        train_step(group, make_weight())
        culprit = group.rank() == CULPRIT
        if culprit:
            Path(folder, "stalled").write_text(str(time.time()))
        if culprit and how == "exits":
            os._exit(0)
        x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = x
        for number in range(3):
            if not (culprit and number == 1):
                y = layer(group, y)
        y.float().sum().backward()
        torch.cuda.synchronize()


# Of two ranks that do different things, neither is the odd one: the report names both calls.
SKIPPED = (
    [f"rank {CULPRIT} diverged: its call 13 is backward of the combine"]
    if RANKS > 2
    else ["diverged: its call 13 is ", "forward dispatch (step 1, MoE call 5", "backward of the combine"]
)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("exits", [f"rank {CULPRIT} has not arrived", "after backward of the dispatch (", "then its process ended"]),
        ("skips a layer", SKIPPED),
    ],
)
def test_a_rank_that_exits_or_goes_another_way(how: str, words: list[str], tmp_path: Path) -> None:
    """Nothing brings such a run back: it is ended when all others have reported."""
    others = [rank for rank in range(RANKS) if rank != CULPRIT]
    for number in range(FRESH_ROUNDS):
        folder, texts = tmp_path / str(number), [""] * RANKS
        folder.mkdir()

        def all_have_reported(folder: Path = folder, texts: list[str] = texts) -> bool:
            for file in folder.glob("[0-9]*"):
                texts[int(file.name)] = file.read_text(errors="replace")
            return all(word in texts[rank] for rank in others for word in words)

        with pytest.raises(RanksError):
            arguments = (RANKS, fresh_round, how, number == 0, str(folder))
            run_ranks(*arguments, backend="nccl", enough=all_have_reported)
        reported = all_have_reported()
        after = time.time() - float(Path(folder, "stalled").read_text())
        assert reported, f"round {number}: {[texts[rank] for rank in others]}"
        say(f"{how}, round {number + 1} of {FRESH_ROUNDS}: all had reported {after:.1f} s after the stall, at most")
