"""What the watchdog writes down and concludes: calls and steps, the GPU's part in them, and the verdict."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.fused_a2a import fused_dispatch
from megatron_ep_v2.watchdog.call_log import DONE, ENTERED, LEFT, MARKED, NUMBERS, RING, SYNC_FREE_DISPATCH, CallLog
from megatron_ep_v2.watchdog.completion import HostClock
from megatron_ep_v2.watchdog.report import STACK_FRAMES, choose_threads, find_late
from tests.helpers import stalls
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.stalls import CULPRIT, HEAD, RANKS, layer, rows, standard_error_in, start, until

LIMIT = 4  # seconds; no call takes so long by itself


# --------------------------------------------------------------------------------------------------- details of calls


class QueuingBuffer:
    """Answers at once, as a GPU's buffer does, whichever ranks are there."""

    def __init__(self, buffer: Any):
        self.buffer, self.group = buffer, buffer.group

    def dispatch(self, x: torch.Tensor, **arguments: Any) -> Any:
        handle = arguments.get("handle") or SimpleNamespace(topk_idx=arguments["topk_idx"])
        return x, None, None, handle, None

    def combine(self, x: torch.Tensor, handle: Any, topk_weights: Any = None, **arguments: Any) -> Any:
        return x, None, None

    def destroy(self) -> None:
        self.buffer.destroy()


class SlowGpu(HostClock):
    """Instead of a GPU's: it does what is queued only as far as `work` says."""

    def __init__(self, record: CallLog):
        super().__init__()
        self.call_log = record

    def mark(self, number: int) -> None:
        self.call_log.cells[MARKED] = number

    def work(self, number: int) -> None:
        self.call_log.cells[DONE] = number % NUMBERS


@isolated
def stick_on_the_gpu(group: Any, folder: str) -> str:
    """All calls have returned, but the culprit did not queue its combine, so the others' GPUs wait in theirs."""
    file = Path(folder, str(group.rank()))
    with standard_error_in(file):
        start(LIMIT)
        layer(group, rows())
        watched: Any = pool.find(group)
        watched.buffer = QueuingBuffer(watched.buffer)
        gpu = watched.watch.clock = SlowGpu(watched.watch.call_log)
        cells = gpu.call_log.cells
        cells[ENTERED] = cells[LEFT] = NUMBERS - 2 * RING  # what the GPU writes begins again, too
        x, topk_idx = rows(), torch.zeros(stalls.TOKENS, 1, dtype=torch.int64)
        for _ in range(2 * RING):  # the record's ring has come round
            handle = watched.dispatch(x, topk_idx=topk_idx)[3]
            watched.combine(x, handle)
            gpu.work(watched.watch.number)
        handle = watched.dispatch(x, topk_idx=topk_idx)[3]
        if group.rank() != CULPRIT:
            watched.combine(x, handle)
            watched.dispatch(x, handle=handle)  # queued after it
        assert cells[LEFT] > NUMBERS + RING
        waits = group.rank() != CULPRIT
        for _ in until(lambda: not waits or HEAD in file.read_text()):
            time.sleep(0.05)
        torch.distributed.barrier(group)
        time.sleep(1.0)
        printed = file.read_text()
        gpu.work(watched.watch.number)
        for _ in until(lambda: not waits or file.read_text() != printed):
            time.sleep(0.05)
        torch.distributed.barrier(group)
        assert waits or file.read_text() == printed, "the others go on"
        pool.destroy_buffers()
    return printed


@pytest.mark.slow
def test_a_call_that_the_gpu_has_not_finished(tmp_path: Path) -> None:
    texts = run_ranks(RANKS, stick_on_the_gpu, str(tmp_path))
    call = f"MoE call {1 + 2 * RING + 1}"
    for rank, text in enumerate(texts):
        if rank == CULPRIT:
            assert text == ""
        else:
            assert text.count(HEAD) == 1, text
            assert re.search(rf"forward combine has not finished for \d+ s \(step 1, {call}", text), text
            assert f"rank {CULPRIT} has not arrived" in text and f"after forward dispatch (step 1, {call}" in text


@isolated
def refuse_one(group: Any) -> list[tuple[int, int, int]]:
    """(calls, step, MoE calls in it) after each of: a step, one that a rank refuses, and one with two optimizers."""
    start(LIMIT)
    seen = []
    for number in range(3):
        x = rows()
        topk_idx = torch.zeros(len(x), 1, dtype=torch.int64)
        if number == 1 and group.rank() == CULPRIT:
            topk_idx += stalls.EXPERTS  # there is no such expert
        try:
            recv, *_ = fused_dispatch(x, topk_idx, torch.ones(len(x), 1), stalls.EXPERTS, group)
            recv.sum().backward()
        except EPError:
            assert number == 1
        watch = pool.find(group).watch  # type: ignore[union-attr]
        seen.append((watch.call_log.cells[LEFT], watch.step, watch.moe_calls))
        for _ in range(2):
            torch.optim.SGD([x], lr=0.1).step()
    return seen


def test_calls_and_steps_are_counted_alike_on_all_ranks() -> None:
    assert run_ranks(RANKS, refuse_one) == [[(2, 1, 1), (2, 2, 0), (4, 2, 1)]] * RANKS


@isolated
def ask_without_the_word(group: Any) -> list[bytes]:
    start(LIMIT)
    heard: list[Any] = []
    listen = pool.Rendezvous.__init__

    def remember(self: Any, *arguments: Any) -> None:
        listen(self, *arguments)
        heard.append(self.address)

    pool.Rendezvous.__init__ = remember  # type: ignore[method-assign]
    try:
        layer(group, rows())
    finally:
        pool.Rendezvous.__init__ = listen  # type: ignore[method-assign]
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


# ------------------------------------------------------------------------------------------------------ record, verdict


@isolated
def dispatch_sync_free(group: Any) -> tuple[int, int, int]:
    """(kind of the call, calls marked for the GPU, calls entered) after a dispatch without a host wait."""
    start(LIMIT)
    layer(group, rows())
    watched: Any = pool.find(group)
    watched.watch.clock = SlowGpu(watched.watch.call_log)
    x = rows()
    topk_idx = torch.zeros(len(x), stalls.TOPK, dtype=torch.int64) + torch.arange(stalls.TOPK)
    weights = torch.ones(topk_idx.shape)
    arguments = {"topk_idx": topk_idx, "topk_weights": weights, "num_experts": stalls.EXPERTS, "do_cpu_sync": False}
    watched.dispatch(x, **arguments)
    record = watched.watch.call_log
    found = (record.call(record.cells[ENTERED])[1], record.cells[MARKED], record.cells[ENTERED])
    record.cells[DONE] = record.cells[MARKED]  # few calls
    return found


def test_the_gpu_writes_when_a_sync_free_dispatch_is_done() -> None:
    for kind, marked, entered in run_ranks(2, dispatch_sync_free):
        assert kind == SYNC_FREE_DISPATCH and marked == entered


def answer(entered: int, *, kinds: str = "dcdcDCDC", end: str = "") -> dict[str, Any]:
    """Of a rank that has entered `entered` calls, of kinds (c)ombine or (d)ispatch, capitals being backward."""
    calls = [[n, "dcDC".index(kinds[n - 1]), 1, 1, 40] for n in range(1, entered + 1)]
    return {"entered": entered, "calls": calls, "end": end}


VERDICTS: dict[str, tuple[dict[int, dict[str, Any]], int, dict[int, str]]] = {
    "all are there": ({0: answer(4), 1: answer(4), 2: answer(5)}, 4, {}),
    "one is late": ({0: answer(4), 1: answer(4), 2: answer(3)}, 4, {2: "not arrived"}),
    "one is late and dead": ({0: answer(4), 1: answer(4), 2: answer(3, end="died")}, 4, {2: "not arrived"}),
    "one has no watcher": ({0: answer(4), 1: answer(4)}, 4, {2: "does not answer"}),
    "one diverged": (
        {0: answer(4), 1: answer(4), 2: answer(4, kinds="dcDC")},
        4,
        {2: "its call 3 is backward of the combine (step 1, MoE call 1), elsewhere forward dispatch"},
    ),
    "one skipped its backward": (
        {0: answer(3, kinds="dcDC"), 1: answer(3, kinds="dcDC"), 2: answer(3, kinds="dcdc")},
        3,
        {2: "its call 3 is forward dispatch (step 1, MoE call 1), elsewhere backward of the combine"},
    ),
    "one trains what comes before the layer (LoRA), the others have it frozen": (
        {0: answer(5, kinds="dcDdc"), 1: answer(4, kinds="dcDdc"), 2: answer(4, kinds="dcDC")},
        4,
        {2: "its call 4 is backward of the dispatch (step 1, MoE call 1), elsewhere forward dispatch"},
    ),
    "asked by the one that diverged": (
        {2: answer(6, kinds="dcDCDC"), 0: answer(4), 1: answer(4)},
        6,
        {2: "its call 3 is backward"},
    ),
    "the others died of it": (
        {0: answer(4, end="died"), 1: answer(4, end="died"), 2: answer(4, kinds="dcDC")},
        4,
        {2: "diverged"},
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict(name: str) -> None:
    answers, number, expected = VERDICTS[name]
    late = find_late(answers, [0, 1, 2], number)
    assert set(late) == set(expected)
    assert all(words in late[rank] for rank, words in expected.items()), late


STACKS = """Thread 0x00000000000000aa (most recent call first):
  File "prefetch.py", line 1 in fetch
  File "/usr/lib/python3.12/threading.py", line 1030 in _bootstrap

Thread 0x00000000000000bb (most recent call first):
  File "experts.py", line 7 in backward

Thread 0x00000000000000dd (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 1030 in _bootstrap

Current thread 0x00000000000000cc (most recent call first):
""" + "\n".join(f'  File "train.py", line {line} in step' for line in range(20))


def test_the_threads_of_a_stack() -> None:
    """The main thread, that of the last call, and autograd's; not those that other Python code started."""
    lines = choose_threads(STACKS, 0xCC, 0xDD).splitlines()
    assert [line.strip() for line in lines[:4]] == [
        'File "experts.py", line 7 in backward',
        "--",
        'File "/usr/lib/python3.12/threading.py", line 1030 in _bootstrap',
        "--",
    ]
    assert lines[4:] == [f'  File "train.py", line {line} in step' for line in range(STACK_FRAMES)] + ["..."]
    assert choose_threads("", 0xCC) == "none was written"
