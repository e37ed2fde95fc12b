"""Ranks that stall on purpose, and what the watchdogs print about it. `stall_rounds.py` runs them many times."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool, reference_header
from megatron_ep_v2.errors import EPError, GroupMismatchError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.watchdog import client
from tests.helpers.harness import HANG, RanksError, isolated, run_ranks

RANKS, CULPRIT = 4, 2
STEPS, LAYERS, HIDDEN, EXPERTS, TOPK, TOKENS = 3, 3, 16, 8, 3, 40
STEP, LAYER = 2, 2  # the culprit stalls before the second layer of the second step
HEAD = "megatron_ep_v2 watchdog, rank"


@dataclass(frozen=True)
class Stall:
    """One way to stall.

    Attributes:
        act: What the culprit does, given a collective that the other ranks are not in and a file, which is there when
            all have reported; True = it then leaves out the layer.
        words: What the reports must contain.
        reporters: The ranks that must report.
        survives: Whether the run goes on afterwards.
    """

    act: Callable[[Callable[[], None], Path], Any]
    words: tuple[str, ...]
    reporters: tuple[int, ...] = (0, 1, 3)
    survives: bool = False


def until(done: Callable[[], bool]) -> Iterator[None]:
    """Again and again until it is done."""
    stop = time.monotonic() + HANG
    while not done() and time.monotonic() < stop:
        yield


def oversleep(_elsewhere: Any, reports: Path) -> None:
    for _ in until(reports.exists):
        time.sleep(0.05)


def hold_the_lock(_elsewhere: Any, reports: Path) -> None:
    """Python's global lock, in C, so that no other thread of this process runs."""
    for _ in until(reports.exists):
        ctypes.PyDLL(None).usleep(200_000)


WAKE = 'until [ -e "$0" ] || ! kill -0 $1; do sleep 0.1; done; kill -CONT $1'


def be_stopped(_elsewhere: Any, reports: Path) -> None:
    subprocess.Popen(["sh", "-c", WAKE, str(reports), str(os.getpid())], stderr=subprocess.DEVNULL)
    os.kill(os.getpid(), signal.SIGSTOP)


def leave(_elsewhere: Any, _reports: Path) -> None:
    os._exit(0)


def skip_the_layer(_elsewhere: Any, _reports: Path) -> bool:
    return True


def wait_elsewhere(elsewhere: Callable[[], None], reports: Path) -> None:
    """In a collective that the other ranks are not in, until its time limit at least."""
    for _ in until(reports.exists):
        with contextlib.suppress(RuntimeError):
            elsewhere()
        time.sleep(0.05)


_WAITS = ("forward dispatch has not finished for", f"(step {STEP}, MoE call {LAYER}, {TOKENS} tokens)")
_FAILS = ("forward dispatch failed with RuntimeError", _WAITS[1])
_LATE = (
    f"rank {CULPRIT} has not arrived",
    f"after forward combine (step {STEP}, MoE call {LAYER - 1}, {TOKENS} tokens)",
)
_STACK = f"rank {CULPRIT}'s stack, newest call first"
STALLS = {
    "sleeps": Stall(oversleep, (*_WAITS, *_LATE, _STACK, "in oversleep"), survives=True),
    "holds Python's lock": Stall(hold_the_lock, (*_WAITS, *_LATE, _STACK, "in hold_the_lock"), survives=True),
    "is stopped": Stall(be_stopped, (*_WAITS, *_LATE, "stopped by a signal"), survives=True),
    "waits elsewhere": Stall(wait_elsewhere, (*_WAITS, *_LATE, _STACK, "in wait_elsewhere"), survives=True),
    "exits": Stall(leave, (*_FAILS, *_LATE, "then its process ended")),
    # It meets the others in their second layer with its third, and goes backward when they come to their third: gloo
    # then ends the processes of the others, for a message longer than they expect.
    "skips a layer": Stall(
        skip_the_layer,
        (
            f"rank {CULPRIT} diverged: its call 17 is backward of the combine (step {STEP}, MoE call 2)",
            f"elsewhere forward dispatch (step {STEP}, MoE call 3)",
        ),
        reporters=(0, 1, 2, 3),
    ),
}


@contextlib.contextmanager
def standard_error_in(path: Path) -> Iterator[None]:
    """This process' and its later children's, written at the end of a file."""
    before = os.dup(2)
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(file)


def start(seconds: int, **more: Any) -> None:
    """The next buffer is watched with this limit, and its watcher may take its time to end."""
    client.END_SECONDS = HANG
    more = {"num_max_tokens_per_rank": TOKENS, **more}
    settings.activate(settings.resolve(buffer="reference", watchdog_secs=seconds, **more))


def rows() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, requires_grad=True)


def layer(group: Any, x: torch.Tensor) -> torch.Tensor:
    top = torch.rand(len(x), EXPERTS).topk(TOPK, dim=1)
    rows, _, row_probs, _, handle = fused_dispatch(x, top.indices, top.values, EXPERTS, group, do_expand=True)
    return fused_combine(rows * row_probs[:, None], group, handle)[0]


@isolated
def train(group: Any, name: str | None, seconds: int, pause: float, folder: str) -> int:
    """Three steps of three layers; the culprit stalls in the second. Returns the steps that it took."""
    with standard_error_in(Path(folder, str(group.rank()))), contextlib.ExitStack() as stack:
        if name == "skips a layer":  # with deep_ep, ranks do not see in a header that they are in different calls
            stack.enter_context(mock.patch.object(reference_header, "compare_over_group"))
        start(seconds)
        side = dist.new_group()

        def wait_alone() -> None:
            # The limit is not new_group's: ranks that come to it late would run into it.
            dist.barrier(side, async_op=True).wait(datetime.timedelta(seconds=pause))

        weight = torch.ones(HIDDEN, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for step in range(1, STEPS + 1):
            y = torch.randn(TOKENS, HIDDEN) * weight
            for number in range(1, LAYERS + 1):
                if name and (group.rank(), step, number) == (CULPRIT, STEP, LAYER):
                    Path(folder, "stalled").write_text(str(time.time()))
                    if STALLS[name].act(wait_alone, Path(folder, "reported")):
                        continue
                y = layer(group, y)
            y.square().mean().backward()
            optimizer.step()
        pool.destroy_buffers()
    return step


@dataclass(frozen=True)
class Outcome:
    """One run: what each rank and its watchdog printed, and the seconds from the stall to their reports."""

    texts: list[str]
    seconds: list[float]
    survived: bool

    def faults(self, stall: Stall) -> list[str]:
        """Everything that the reports lack; nothing if they name the right rank and call."""
        return [
            f"rank {rank} does not say {words!r}"
            for rank in stall.reporters
            for words in stall.words
            if words not in self.texts[rank]
        ]


def run(name: str | None, seconds: int, pause: float) -> Outcome:
    """Train with one stall, or with none.

    Args:
        name: In STALLS.
        seconds: The watchdog's limit.
        pause: How long a collective waits that the culprit is alone in.

    Raises:
        RanksError: The ranks failed before the stall, or with none.
    """
    reported: list[float] = [float("inf")] * RANKS
    with tempfile.TemporaryDirectory() as folder:
        stalled = Path(folder, "stalled")
        files = [Path(folder, str(rank)) for rank in range(RANKS)]
        for file in files:
            file.touch()
        over, all_reported = threading.Event(), Path(folder, "reported")

        def observe() -> None:
            while not over.wait(0.05):
                for rank, file in enumerate(files):
                    if reported[rank] == float("inf") and HEAD in file.read_text(errors="replace"):
                        reported[rank] = time.time()
                if all(reported[rank] < float("inf") for rank in (STALLS[name].reporters if name else ())):
                    all_reported.touch()

        observer = threading.Thread(target=observe)
        observer.start()
        try:
            try:
                run_ranks(RANKS, train, name, seconds, pause, folder)
                survived = True
            except RanksError:
                if not stalled.exists():
                    raise
                survived = False
            for _ in until(all_reported.exists):
                time.sleep(0.1)
            time.sleep(0.5)  # for what should not be said
        finally:
            over.set()
            observer.join()
        began = float(stalled.read_text()) if name else 0.0
        return Outcome([file.read_text() for file in files], [at - began for at in reported], survived)


@isolated
def bring_another_capacity(group: Any) -> tuple[str, str, float]:
    """No stall, because the ranks compare it before the first dispatch: kind and text of the error, seconds."""
    start(1, num_max_tokens_per_rank=64 if group.rank() == CULPRIT else 128)
    began = time.monotonic()
    try:
        layer(group, rows())
    except EPError as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "none", "", 0.0


def capacity_faults(answers: list[tuple[str, str, float]]) -> list[str]:
    return [
        f"rank {rank}: {kind}: {text}"
        for rank, (kind, text, _) in enumerate(answers)
        if kind != GroupMismatchError.__name__ or f"num_max_tokens_per_rank: rank {CULPRIT} has 64" not in text
    ]
