"""The watchdog: injected stalls, what must not be reported, and the record that it reads."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.started_a2a import finish_combine, finish_dispatch, start_combine, start_dispatch
from tests.helpers import stalls
from tests.helpers.cases import SMALL, make_batch
from tests.helpers.harness import HANG, isolated, run_ranks
from tests.helpers.stacks import on_one_stack
from tests.helpers.stalls import CULPRIT, HEAD, RANKS, STALLS, layer, rows, standard_error_in, start, until

# Seconds; no call takes so long by itself. `python -m tests.helpers.stall_rounds` runs the same with the default.
LIMIT = 4


# ------------------------------------------------------------------------------------------------- injected stalls


@pytest.mark.slow
@on_one_stack
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
            assert HEAD not in outcome.texts[rank], "the late rank waits for no other"


def test_another_capacity_is_named_on_every_rank() -> None:
    assert not stalls.capacity_faults(run_ranks(RANKS, stalls.bring_another_capacity))


@isolated
def wait_with_the_lock(group: Any, folder: str) -> str:
    """As deep_ep's dispatch does. What had been printed when the waiting rank could run again."""
    files = [Path(folder, str(rank)) for rank in range(RANKS)]
    pipe = os.open(Path(folder, f"{group.rank()} goes on"), os.O_RDWR)
    with standard_error_in(files[group.rank()]):
        start(1)
        layer(group, rows())
        original, libc = ReferenceBuffer.dispatch, ctypes.PyDLL(None)

        def dispatch(self: Any, *args: Any, **arguments: Any) -> Any:
            libc.read(pipe, ctypes.create_string_buffer(1), 1)
            printed.append(files[group.rank()].read_text())
            return original(self, *args, **arguments)

        printed: list[str] = []
        if group.rank() == CULPRIT:
            waiting = [file for rank, file in enumerate(files) if rank != CULPRIT]
            for _ in until(lambda: all(HEAD in file.read_text() for file in waiting)):
                time.sleep(0.05)
            for file in waiting:
                Path(f"{file} goes on").write_bytes(b"!")
        else:
            ReferenceBuffer.dispatch = dispatch  # type: ignore[method-assign]
        try:
            layer(group, rows())
        finally:
            ReferenceBuffer.dispatch = original  # type: ignore[method-assign]
        pool.destroy_buffers()
    os.close(pipe)
    return "".join(printed)


def test_a_rank_that_waits_with_pythons_lock_still_reports(tmp_path: Path) -> None:
    for rank in range(RANKS):
        (tmp_path / str(rank)).touch()
        os.mkfifo(tmp_path / f"{rank} goes on")
    texts = run_ranks(RANKS, wait_with_the_lock, str(tmp_path))
    for rank in set(range(RANKS)) - {CULPRIT}:
        assert f"rank {CULPRIT} has not arrived" in texts[rank] and "in wait_with_the_lock" in texts[rank]


@isolated
def fail_alone(group: Any, folder: str) -> str:
    """Rank 1 fails between the start of a dispatch and its wait, and does not go on; what rank 0 says, which waits in
    its combine."""
    file = Path(folder, str(group.rank()))
    batch = make_batch(SMALL, group.rank())
    with standard_error_in(file):
        start(1, num_max_tokens_per_rank=64)
        started = start_dispatch(batch.x.double(), batch.topk_idx, batch.topk_weights.double(), SMALL.experts, group)
        assert started is not None
        if group.rank() == 1:
            for _ in until(lambda: "stack, newest" in Path(folder, "0").read_text()):
                time.sleep(0.05)
        rows, _, _, handle = finish_dispatch(started)
        combining = start_combine(rows, group, handle)
        assert combining is not None
        finish_combine(combining)
        pool.destroy_buffers()
    return file.read_text()


def test_a_rank_that_fails_between_start_and_wait_is_named(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).touch()
    waiting, failed = run_ranks(2, fail_alone, str(tmp_path))
    assert "rank 0: forward combine has not finished for" in waiting and "goes on after" in waiting
    assert "rank 1 has not arrived" in waiting and "after forward dispatch (step 1, MoE call 1" in waiting
    assert "in fail_alone" in waiting and HEAD not in failed


@isolated
def arrive_late(group: Any) -> str:
    said: list[str] = []
    handler = logging.Handler()
    store = group.get_group_store()

    def emit(record: logging.LogRecord) -> None:
        said.append(record.getMessage())
        store.set(f"{group.rank()} has warned", "")

    handler.emit = emit  # type: ignore[method-assign]
    logging.getLogger("megatron_ep_v2").addHandler(handler)
    start(LIMIT)
    if group.rank() == CULPRIT:
        store.wait([f"{rank} has warned" for rank in range(RANKS) if rank != CULPRIT], timedelta(seconds=HANG))
    layer(group, rows())
    logging.getLogger("megatron_ep_v2").removeHandler(handler)
    return " ".join(said)


@pytest.mark.slow
def test_a_rank_that_does_not_arrive_at_the_first_dispatch_is_named() -> None:
    for rank, said in enumerate(run_ranks(RANKS, arrive_late)):
        assert (f"waits for rank(s) [{CULPRIT}]" in said) == (rank != CULPRIT), said


# ------------------------------------------------------------------------------------------- what must not be reported


@isolated
def pause_everywhere(group: Any, folder: str) -> list[bool]:
    """A long pause outside of calls, on all ranks; and whether the watcher was there, and is gone after it."""
    with standard_error_in(Path(folder, str(group.rank()))):
        start(LIMIT)
        y = layer(group, rows())
        time.sleep(LIMIT + 0.5)
        y.sum().backward()
        process = pool.find(group).watch.client.process  # type: ignore[union-attr]
        alive = process.poll() is None
        pool.destroy_buffers()
    return [alive, process.poll() == 0]


@pytest.mark.slow
def test_no_report_of_a_run_in_which_no_rank_is_late(tmp_path: Path) -> None:
    assert run_ranks(RANKS, pause_everywhere, str(tmp_path)) == [[True, True]] * RANKS
    assert [file.read_text() for file in tmp_path.iterdir()] == [""] * RANKS


@isolated
def give_up(group: Any, folder: str) -> list[bool]:
    """An error between the start of a call and its wait, and a long pause after it, on all ranks, as where a training
    loop skips a batch and saves a checkpoint; whether the next step is right; and then such an error at the end."""
    batch = make_batch(SMALL, group.rank())
    given = (batch.x.double(), batch.topk_idx, batch.topk_weights.double(), SMALL.experts, group)
    with standard_error_in(Path(folder, str(group.rank()))):
        start(LIMIT, num_max_tokens_per_rank=64)
        found = []
        for give_up in ("dispatch", "combine", ""):
            started = start_dispatch(*given)
            assert started is not None
            if give_up == "dispatch":
                time.sleep(LIMIT + 0.5)
                continue
            rows, _, _, handle = finish_dispatch(started)
            combining = start_combine(rows, group, handle)
            assert combining is not None
            if give_up == "combine":
                time.sleep(LIMIT + 0.5)
                continue
            times = (batch.topk_idx >= 0).sum(dim=1, keepdim=True)
            found.append(torch.allclose(finish_combine(combining), times * given[0]))
        start_dispatch(*given)
        pool.destroy_buffers()
    return found


@pytest.mark.slow
def test_no_report_of_a_call_that_was_started_and_given_up(tmp_path: Path) -> None:
    assert run_ranks(2, give_up, str(tmp_path)) == [[True]] * 2
    assert [file.read_text() for file in tmp_path.iterdir()] == [""] * 2


@isolated
def stall_unwatched(group: Any, folder: str) -> str:
    with standard_error_in(Path(folder, str(group.rank()))):
        start(0)
        layer(group, rows())
    return type(pool.find(group)).__name__


def test_without_a_limit_nothing_is_watched(tmp_path: Path) -> None:
    assert run_ranks(RANKS, stall_unwatched, str(tmp_path)) == [ReferenceBuffer.__name__] * RANKS
    assert [file.read_text() for file in tmp_path.iterdir()] == [""] * RANKS
    assert settings.Settings().watchdog_secs == 10


SCRIPT = """
import datetime, os, sys, time
import torch.distributed as dist
from tests.helpers import stalls
from megatron_ep_v2 import settings
rank, how = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore({store!r} + how, 2), rank=rank, world_size=2)
settings.activate(settings.resolve(buffer="reference", watchdog_secs=60))
stalls.layer(dist.group.WORLD, stalls.torch.randn(4, 16))
dist.barrier()
print("ready", flush=True)
if how == "forgets to destroy":
    sys.exit()
time.sleep(3600)
"""


@pytest.mark.slow
@on_one_stack
@pytest.mark.parametrize("how", ["forgets to destroy", "is interrupted"])
def test_watchers_end_with_their_job_and_say_nothing(how: str, tmp_path: Path) -> None:
    script = SCRIPT.format(store=str(tmp_path / "store"))
    environment = {**os.environ, "PYTHONPATH": str(Path(megatron_ep_v2.__file__).parents[1])}
    job = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), how], stdout=-1, stderr=-1, env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in job] == [b"ready\n"] * 2
        if how == "is interrupted":
            for process in job:
                process.terminate()
        errors = [
            process.communicate(timeout=HANG)[1].decode() for process in job
        ]  # ends when no process holds the pipe
    finally:
        for process in job:
            process.kill()
    assert [HEAD in error for error in errors] == [False, False], errors
