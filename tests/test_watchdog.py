"""The watchdog: injected stalls, what must not be reported, and the record that it reads."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stalls
import torch
from harness import run_ranks
from moe import own_package
from stalls import CULPRIT, HEAD, RANKS, STALLS, layer, standard_error_in

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.errors import EPError, GroupMismatchError, UnavailableError
from megatron_ep_v2.fused_a2a import fused_dispatch
from megatron_ep_v2.watchdog.arrivals import Arrival, summarize
from megatron_ep_v2.watchdog.record import DONE, LEFT, MARKED, RECORD_BYTES, RING, Record
from megatron_ep_v2.watchdog.report import find_late

LIMIT = 1  # second; `python tests/stalls.py` runs the same with the default


def start(seconds: int) -> None:
    settings.activate(settings.resolve(buffer="reference", watchdog_secs=seconds))


def rows() -> torch.Tensor:
    return torch.randn(stalls.TOKENS, stalls.HIDDEN, requires_grad=True)


# ------------------------------------------------------------------------------------------------- injected stalls


@pytest.mark.parametrize("name", STALLS)
def test_a_stall_is_reported_on_every_waiting_rank(name: str) -> None:
    stall = STALLS[name]
    outcome = stalls.run(name, LIMIT, LIMIT + 2.0)
    assert not outcome.faults(stall), "\n".join([*outcome.faults(stall), *outcome.texts])
    assert outcome.survived == stall.survives
    for rank in range(RANKS):
        reports, resumed = outcome.texts[rank].count(": forward "), outcome.texts[rank].count("goes on after")
        if rank != CULPRIT:
            assert (outcome.texts[rank].count(HEAD), reports) == (1 + stall.survives, 1), outcome.texts[rank]
            assert resumed == stall.survives
        elif CULPRIT not in stall.reporters:
            assert HEAD not in outcome.texts[rank], "the late rank waits for nobody"


@own_package
def other_capacity(group: Any) -> tuple[str, str, float]:
    start(LIMIT)
    if group.rank() == CULPRIT:
        settings.activate(settings.resolve(buffer="reference", watchdog_secs=LIMIT, num_max_tokens_per_rank=64))
    began = time.monotonic()
    try:
        layer(group, rows())
    except EPError as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "none", "", 0.0


def test_another_capacity_is_named_on_every_rank_at_once() -> None:
    for kind, text, seconds in run_ranks(RANKS, other_capacity):
        assert kind == GroupMismatchError.__name__
        assert f"num_max_tokens_per_rank: rank {CULPRIT} has 64" in text
        assert seconds < stalls.ENOUGH


@own_package
def wait_with_the_lock(group: Any, folder: str) -> str:
    """As deep_ep's dispatch does. What had been printed when the waiting rank could run again."""
    file = Path(folder, str(group.rank()))
    with standard_error_in(file):
        start(LIMIT)
        layer(group, rows())
        original, libc = ReferenceBuffer.dispatch, ctypes.PyDLL(None)

        def dispatch(self: Any, *args: Any, **arguments: Any) -> Any:
            libc.usleep(2_000_000)
            printed.append(file.read_text())
            return original(self, *args, **arguments)

        printed: list[str] = []
        if group.rank() == CULPRIT:
            time.sleep(2)
        else:
            ReferenceBuffer.dispatch = dispatch  # type: ignore[method-assign]
        try:
            layer(group, rows())
        finally:
            ReferenceBuffer.dispatch = original  # type: ignore[method-assign]
        pool.destroy_buffers()
    return "".join(printed)


def test_a_rank_that_waits_with_pythons_lock_still_reports(tmp_path: Path) -> None:
    texts = run_ranks(RANKS, wait_with_the_lock, str(tmp_path))
    for rank in set(range(RANKS)) - {CULPRIT}:
        assert f"rank {CULPRIT} has not arrived" in texts[rank] and "in wait_with_the_lock" in texts[rank]


@own_package
def come_late(group: Any) -> str:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_ep_v2").addHandler(handler)
    start(LIMIT)
    if group.rank() == CULPRIT:
        time.sleep(LIMIT + 2)  # a FileStore counts whole seconds
    layer(group, rows())
    logging.getLogger("megatron_ep_v2").removeHandler(handler)
    return " ".join(said)


def test_a_rank_that_does_not_come_to_the_first_dispatch_is_named() -> None:
    for rank, said in enumerate(run_ranks(RANKS, come_late)):
        assert (f"waits for rank(s) [{CULPRIT}]" in said) == (rank != CULPRIT), said


# ------------------------------------------------------------------------------------------- what must not be reported


@own_package
def pause_everywhere(group: Any, folder: str) -> list[bool]:
    """Long pauses outside of calls, on all ranks; and whether the watcher was there, and is gone after it."""
    with standard_error_in(Path(folder, str(group.rank()))):
        start(LIMIT)
        for _ in range(2):
            y = layer(group, rows())
            time.sleep(LIMIT + 0.5)
            y.sum().backward()
        process = pool.find(group).watch._process  # type: ignore[union-attr]
        alive = process.poll() is None
        pool.destroy_buffers()
    return [alive, process.poll() == 0]


def test_no_report_of_a_run_in_which_nobody_is_late(tmp_path: Path) -> None:
    assert run_ranks(RANKS, pause_everywhere, str(tmp_path)) == [[True, True]] * RANKS
    assert [file.read_text() for file in tmp_path.iterdir()] == [""] * RANKS


@own_package
def stall_unwatched(group: Any, folder: str) -> str:
    with standard_error_in(Path(folder, str(group.rank()))):
        start(0)
        for number in range(2):
            if number and group.rank() == CULPRIT:
                time.sleep(2)
            layer(group, rows())
    return type(pool.find(group)).__name__


def test_without_a_limit_nothing_is_watched(tmp_path: Path) -> None:
    assert run_ranks(RANKS, stall_unwatched, str(tmp_path)) == [ReferenceBuffer.__name__] * RANKS
    assert [file.read_text() for file in tmp_path.iterdir()] == [""] * RANKS
    assert settings.Settings().watchdog_secs == 10


SCRIPT = """
import datetime, os, sys, time
import torch.distributed as dist
sys.path.insert(0, {tests!r})
import stalls
from megatron_ep_v2 import settings
rank, how = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore({store!r} + how, 2), rank=rank, world_size=2)
settings.activate(settings.resolve(buffer="reference"))
stalls.layer(dist.group.WORLD, stalls.torch.randn(4, 16))
dist.barrier()
if how == "forgets to destroy":
    sys.exit()
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["forgets to destroy", "is interrupted"])
def test_watchers_end_with_their_job_and_say_nothing(how: str, tmp_path: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), store=str(tmp_path / "store"))
    environment = {**os.environ, "PYTHONPATH": str(Path(megatron_ep_v2.__file__).parents[1])}
    job = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), how], stderr=subprocess.PIPE, env=environment)
        for rank in range(2)
    ]
    try:
        if how == "is interrupted":
            wait_for_watchers(job)
            for process in job:
                process.terminate()
        errors = [process.communicate(timeout=60)[1].decode() for process in job]  # ends when nobody holds the pipe
    finally:
        for process in job:
            process.kill()
    assert [HEAD in error for error in errors] == [False, False], errors


def wait_for_watchers(job: list[subprocess.Popen[bytes]]) -> None:
    stop = time.monotonic() + 60
    while time.monotonic() < stop:
        children = [Path(f"/proc/{each.pid}/task/{each.pid}/children").read_text() for each in job]
        if all(children):
            return
        time.sleep(0.1)
    raise AssertionError("no watcher was started")


# --------------------------------------------------------------------------------------------------- details of calls


class QueuingBuffer:
    """Answers at once, as a GPU's buffer does, whoever is there."""

    def __init__(self, buffer: Any):
        self.buffer, self.group = buffer, buffer.group

    def dispatch(self, x: torch.Tensor, **arguments: Any) -> Any:
        handle = arguments.get("handle") or SimpleNamespace(topk_idx=arguments["topk_idx"])
        return x, None, None, handle, None

    def combine(self, x: torch.Tensor, handle: Any, topk_weights: Any = None, **arguments: Any) -> Any:
        return x, None, None

    def destroy(self) -> None:
        self.buffer.destroy()


class SlowGpu:
    """In a GPU's place: it does what is queued only as far as `work` says."""

    def __init__(self, record: Record):
        self.record = record

    def now(self) -> float:
        return 0.0

    def mark(self, number: int) -> None:
        self.record.cells[MARKED] = number

    def work(self, number: int) -> None:
        self.record.cells[DONE] = number % RING

    def close(self) -> None:
        pass


@own_package
def stick_on_the_gpu(group: Any, folder: str) -> str:
    """All calls have returned, but the culprit did not queue its combine, so the others' GPUs wait in theirs."""
    file = Path(folder, str(group.rank()))
    with standard_error_in(file):
        start(LIMIT)
        layer(group, rows())
        watched: Any = pool.find(group)
        watched.buffer = QueuingBuffer(watched.buffer)
        gpu = watched.watch.clock = SlowGpu(watched.watch.record)
        x, picks = rows(), torch.zeros(stalls.TOKENS, 1, dtype=torch.int64)
        for _ in range(2 * RING):  # the numbers on the GPU's side have come round
            handle = watched.dispatch(x, topk_idx=picks)[3]
            watched.combine(x, handle)
            gpu.work(watched.watch.number)
        handle = watched.dispatch(x, topk_idx=picks)[3]
        if group.rank() != CULPRIT:
            watched.combine(x, handle)
            watched.dispatch(x, handle=handle)  # queued behind it
        time.sleep(LIMIT + 2)
        printed = file.read_text()
        gpu.work(watched.watch.number)
        time.sleep(0.5)
        assert (file.read_text() == printed) == (group.rank() == CULPRIT), "the others go on"
        pool.destroy_buffers()
    return printed


def test_a_call_that_the_gpu_has_not_finished(tmp_path: Path) -> None:
    texts = run_ranks(RANKS, stick_on_the_gpu, str(tmp_path))
    call = f"MoE call {1 + 2 * RING + 1}"
    for rank, text in enumerate(texts):
        if rank == CULPRIT:
            assert text == ""
        else:
            assert text.count(HEAD) == 1 and f"forward combine has not finished for 1 s (step 1, {call}" in text, text
            assert f"rank {CULPRIT} has not arrived" in text and f"after forward dispatch (step 1, {call}" in text


@own_package
def refuse_one(group: Any) -> list[tuple[int, int, int]]:
    """(calls, step, MoE calls in it) after each of: a step, one that a rank refuses, and one with two optimizers."""
    start(LIMIT)
    seen = []
    for number in range(3):
        x = rows()
        picks = torch.zeros(len(x), 1, dtype=torch.int64)
        if number == 1 and group.rank() == CULPRIT:
            picks += stalls.EXPERTS  # there is no such expert
        try:
            recv, *_ = fused_dispatch(x, picks, torch.ones(len(x), 1), stalls.EXPERTS, group)
            recv.sum().backward()
        except EPError:
            assert number == 1
        watch = pool.find(group).watch  # type: ignore[union-attr]
        seen.append((watch.record.cells[LEFT], watch.step, watch.moe_calls))
        for _ in range(2):
            torch.optim.SGD([x], lr=0.1).step()
    return seen


def test_calls_and_steps_are_counted_alike_on_all_ranks() -> None:
    assert run_ranks(RANKS, refuse_one) == [[(2, 1, 1), (2, 2, 0), (4, 2, 1)]] * RANKS


@own_package
def ask_without_the_word(group: Any) -> list[bytes]:
    start(LIMIT)
    heard: list[Any] = []
    listen = pool.Meeting.__init__

    def remember(self: Any, *arguments: Any) -> None:
        listen(self, *arguments)
        heard.append(self.address)

    pool.Meeting.__init__ = remember  # type: ignore[method-assign]
    try:
        layer(group, rows())
    finally:
        pool.Meeting.__init__ = listen  # type: ignore[method-assign]
    address, port, token = heard[0]
    answers = []
    for word in ("guess", token):
        with socket.create_connection((address, port), 5) as line:
            line.sendall(f"{word} where 0\n".encode())
            answers.append(line.makefile("rb").readline())
    return answers


def test_a_watcher_answers_only_watchers() -> None:
    for rank, (refused, answer) in enumerate(run_ranks(2, ask_without_the_word)):
        assert refused == b""
        assert json.loads(answer)["rank"] == rank


# --------------------------------------------------------------------------------------------- record, verdict, summary


@pytest.fixture
def record(tmp_path: Path) -> Record:
    path = tmp_path / "record"
    path.write_bytes(bytes(RECORD_BYTES))
    with path.open("r+b") as file:
        return Record(file.fileno())


def test_the_record_knows_the_first_call_that_has_not_finished(record: Record) -> None:
    assert record.pending() == 0
    for kind in range(4):  # a dispatch, which waits on the host; then three calls that the GPU queues
        assert record.enter(kind, 1, 7, 40) == record.pending() == kind + 1
        record.cells[LEFT] = kind + 1
        assert record.pending() == 0
    assert record.call(3) == [3, 2, 1, 7, 40]
    record.cells[MARKED] = 2
    assert record.pending() == 2, "past the dispatch, which was left"
    record.cells[MARKED] = 4
    record.cells[DONE] = 3
    assert record.pending() == 4
    record.enter(0, 1, 8, 40)
    assert record.pending() == 4, "the GPU is behind the host"
    record.cells[DONE] = 4
    assert record.pending() == 5
    record.retract()
    assert record.pending() == 0


def answer(entered: int, *, kinds: str = "dcdcDCDC", end: str = "") -> dict[str, Any]:
    """Of a rank that has entered `entered` calls, of kinds (c)ombine or (d)ispatch, capitals being backward."""
    calls = [[n, "dcDC".index(kinds[n - 1]), 1, 1, 40] for n in range(1, entered + 1)]
    return {"entered": entered, "calls": calls, "end": end}


VERDICTS: dict[str, tuple[dict[int, dict[str, Any]], int, dict[int, str]]] = {
    "all are there": ({0: answer(4), 1: answer(4), 2: answer(5)}, 4, {}),
    "one is behind": ({0: answer(4), 1: answer(4), 2: answer(3)}, 4, {2: "not arrived"}),
    "one is behind and dead": ({0: answer(4), 1: answer(4), 2: answer(3, end="died")}, 4, {2: "not arrived"}),
    "one has no watcher": ({0: answer(4), 1: answer(4)}, 4, {2: "no answer"}),
    "one took another way": (
        {0: answer(4), 1: answer(4), 2: answer(4, kinds="dcDC")},
        4,
        {2: "its call 3 is backward of the combine (step 1, MoE call 1), elsewhere forward dispatch"},
    ),
    "asked by the one that took another way": (
        {2: answer(6, kinds="dcDCDC"), 0: answer(4), 1: answer(4)},
        6,
        {2: "its call 3 is backward"},
    ),
    "the others died of it": (
        {0: answer(4, end="died"), 1: answer(4, end="died"), 2: answer(4, kinds="dcDC")},
        4,
        {2: "another way"},
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict(name: str) -> None:
    answers, number, expected = VERDICTS[name]
    late = find_late(answers, [0, 1, 2], number)
    assert set(late) == set(expected)
    assert all(words in late[rank] for rank, words in expected.items()), late


def test_the_summary_of_arrivals() -> None:
    """Rank 0 comes 5 ms before rank 1; rank 2 comes 20 ms after it, but for one dispatch, to which it comes first."""
    waits = {
        0: {1: 0.125, 2: 0.125, 3: 0.225, 4: 0.105},
        1: {1: 0.120, 2: 0.120, 3: 0.220, 4: 0.100, 9: 1.0},
        2: {1: 0.100, 2: 0.100, 3: 0.200, 4: 0.110},
    }
    summary = summarize(waits)
    assert summary.dispatches == 4, "the ninth was seen by one rank only"
    rounded = [(a.rank, a.times_last, round(a.median_ms, 6), round(a.worst_ms, 6)) for a in summary.arrivals]
    assert rounded == [(2, 3, 20.0, 20.0), (1, 1, 0.0, 5.0), (0, 0, -5.0, 0.0)]
    assert str(summary).splitlines()[2].split() == ["2", "3", "+20.00", "+20.00"]


@own_package
def straggle(group: Any) -> tuple[list[Arrival], str]:
    start(LIMIT)
    for _ in range(8):
        if group.rank() == CULPRIT:
            time.sleep(0.15)
        layer(group, rows())
    first = megatron_ep_v2.stragglers()
    assert megatron_ep_v2.stragglers(group) == first
    pool.destroy_buffers()
    with pytest.raises(UnavailableError) as caught:
        megatron_ep_v2.stragglers()
    return list(first.arrivals), str(caught.value)


def test_stragglers_are_named_on_demand() -> None:
    answers = run_ranks(RANKS, straggle)
    assert all(answer == answers[0] for answer in answers)
    arrivals, error = answers[0]
    assert arrivals[0].rank == CULPRIT and arrivals[0].times_last >= 6 and arrivals[0].median_ms > 30
    assert sum(one.times_last for one in arrivals) == 8
    assert "MCORE_DEEPEP_V2_WATCHDOG_SECS" in error
