"""Creating and destroying buffers, and everything that goes wrong in between: no hang, and an error with a name."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import EPError, GroupMismatchError, InputError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.gpus import gpu_ranks
from tests.helpers.carriers import v2_carrier
from tests.helpers.compare import relative_error
from tests.helpers.harness import HANG, isolated, run_ranks
from tests.helpers.progress import say

JOBS = Path(__file__).parent / "jobs"
RANKS = gpu_ranks()
# What DeepEP says when one of its own time limits (100 s on the GPU, 300 s on the host) has passed.
TIMED_OUT = re.compile("Dispatch CPU wait exception|DeepEP [^\n]*timeout")
ROUNDS = {"never": 20, "step": 20, "rank": 2, "capacity": 2}  # what goes wrong -> rounds; see jobs/rounds.py


def job(*arguments: str) -> tuple[int, str]:
    """torchrun on all GPUs: exit code, output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += [str(JOBS / arguments[0]), *arguments[1:]]
    say(f"torchrun {' '.join(arguments)}")
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    say(f"torchrun {' '.join(arguments)}: {time.monotonic() - start:.1f} s")
    return done.returncode, done.stdout + done.stderr


Jobs = dict[str, "Future[tuple[int, str]]"]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """All at the same time: most of each is starting up."""
    with ThreadPoolExecutor(len(ROUNDS)) as pool:
        yield {fail: pool.submit(job, "rounds.py", v2_carrier(), str(rounds), fail) for fail, rounds in ROUNDS.items()}


@pytest.mark.parametrize("fail", ["never", "step"])
def test_twenty_rounds(fail: str, jobs: Jobs) -> None:
    code, output = jobs[fail].result()
    assert code == 0, output
    assert "20 rounds done" in output and "destroy()` is not called" not in output and "was given up" not in output


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ("rank", ["BrokenOffError: round 1"]),
        ("capacity", ["TokenCapacityError: rank 1 has 256 tokens", "MCORE_DEEPEP_V2_MAX_TOKENS_PER_RANK=256"]),
    ],
)
def test_one_rank_that_fails_ends_the_job(fail: str, words: list[str], jobs: Jobs) -> None:
    code, output = jobs[fail].result()
    assert code != 0
    assert all(word in output for word in words), output
    assert not TIMED_OUT.search(output), output


CULPRIT = 1
MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "capacity": (lambda a: {"settings": {"num_max_tokens_per_rank": 512}}, "num_max_tokens_per_rank"),
    "hidden": (lambda a: {"x": a["x"][:, :256].contiguous()}, "hidden"),
    "top-k": (
        lambda a: {"token_indices": a["token_indices"][:, :3], "token_probs": a["token_probs"][:, :3]},
        "top-k",
    ),
    "experts": (lambda a: {"num_experts": a["num_experts"] * 2}, "num_experts"),
    "layout": (lambda a: {"settings": {"layout": "compact"}}, "layout"),
    "dtype": (lambda a: {"x": a["x"].float()}, "payload dtype"),
    "num_sms": (lambda a: {"settings": {"num_sms": 32}}, "num_sms"),
}


def mismatch(group: Any, names: list[str]) -> list[tuple[str, str]]:
    """Each mistake on one rank, one after the other: kind of error, its text."""
    answers = []
    for name in names:
        num_experts = 4 * group.size()
        arguments: dict[str, Any] = {
            "x": torch.randn(16, 512, device="cuda", dtype=torch.bfloat16),
            "token_indices": torch.rand(16, num_experts, device="cuda").topk(4, dim=1).indices,
            "token_probs": torch.rand(16, 4, device="cuda"),
            "num_experts": num_experts,
        }
        if group.rank() == CULPRIT:
            arguments |= MISTAKES[name][0](arguments)
        settings.activate(settings.resolve(buffer=v2_carrier(), **arguments.pop("settings", {})))
        try:
            fused_dispatch(**arguments, group=group)
            answers.append(("none", ""))
        except EPError as error:
            answers.append((type(error).__name__, str(error)))
        pool.destroy_buffers()
    return answers


def test_a_mismatch_is_named_on_every_rank() -> None:
    by_rank = run_ranks(RANKS, mismatch, list(MISTAKES), backend="nccl")
    for answers in by_rank:
        for (name, (_, word)), (kind, text) in zip(MISTAKES.items(), answers, strict=True):
            assert kind == GroupMismatchError.__name__, f"{name}: {kind} {text}"
            assert f"rank {CULPRIT} has" in text and word in text


def unsupported(group: Any) -> str:
    settings.activate(settings.resolve(buffer=v2_carrier()))
    x = torch.randn(4, 300, device="cuda", dtype=torch.bfloat16)
    topk_idx = torch.zeros(4, 1, device="cuda", dtype=torch.int64)
    with pytest.raises(InputError) as caught:
        fused_dispatch(x, topk_idx, torch.ones(4, 1, device="cuda"), group.size(), group)
    return str(caught.value)


@isolated
def grow(group: Any) -> list[dict[str, Any]]:
    """No capacity is set. A forward of 96 tokens is pending when rank 1 has 128: all ranks build a larger buffer. The
    pending backward runs on the old one, which is destroyed in the next dispatch."""
    settings.activate(settings.resolve(buffer=v2_carrier(), watchdog_secs=30))
    pending = Layer(group, 96)
    watched: Any = pool.find(group)
    old, capacities = watched.buffer.buffer, [watched.num_max_tokens_per_rank]
    errors = [Layer(group, 128 if group.rank() == CULPRIT else 32).errors()]
    capacities.append(watched.num_max_tokens_per_rank)
    alive = [old._buffer is not None]
    errors.append(pending.errors())
    errors.append(Layer(group, 128).errors())
    alive.append(old._buffer is not None)
    pool.destroy_buffers()
    return [{"errors": errors, "capacities": capacities, "alive": alive}]


class Layer:
    """Dispatch and combine with experts that pass rows through, weighted; its backward has not run yet."""

    def __init__(self, group: Any, tokens: int):
        experts = 4 * group.size()
        self.x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        top = torch.rand(tokens, experts, device="cuda").topk(4, dim=1)
        self.probs = top.values.clone().requires_grad_()
        rows, _, row_probs, _, handle = fused_dispatch(self.x, top.indices, self.probs, experts, group, do_expand=True)
        self.y = fused_combine((rows * row_probs[:, None]).bfloat16(), group, handle)[0]

    def errors(self) -> list[float]:
        """Run the backward. Relative L2 errors of y = x * sum(probs) and of its gradients, against fp64."""
        self.y.sum().backward()
        x, probs = (leaf.detach().double().requires_grad_() for leaf in (self.x, self.probs))
        y = x * probs.sum(dim=1, keepdim=True)
        y.sum().backward()
        pairs = ((self.y, y), (self.x.grad, x.grad), (self.probs.grad, probs.grad))
        return [relative_error(mine, wanted) for mine, wanted in pairs]


def test_a_capacity_grows_while_a_backward_is_pending() -> None:
    for [found] in run_ranks(RANKS, grow, backend="nccl"):
        assert all(error < 2e-2 for errors in found["errors"] for error in errors), found
        assert found["capacities"] == [96, 128]
        assert found["alive"] == [True, False], "the old buffer goes once no rank has a handle of it"


def test_a_hidden_size_that_the_kernels_do_not_carry() -> None:
    for text in run_ranks(2, unsupported, backend="nccl"):
        assert "hidden=300" in text and "a multiple of 256" in text
