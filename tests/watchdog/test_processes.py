"""Processes next to a rank: its forked children, which own nothing of it, and its watcher, which ends with it and
listens where the watchers of other hosts can reach it."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.deep_ep import everyone_arrives
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.device_checks import DeviceCheck
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.fused_a2a import fused_dispatch
from megatron_ep_v2.watchdog import client, rendezvous
from megatron_ep_v2.watchdog.call_log import ENTERED, LEFT, LOG_BYTES
from megatron_ep_v2.watchdog.watcher import Task
from tests.helpers import stalls
from tests.helpers.harness import HANG, isolated, run_ranks
from tests.helpers.stalls import HEAD, rows, standard_error_in

LIMIT = 60  # seconds; no call is late here
CHILD_SECONDS = 60  # for a forked child that hangs

# ------------------------------------------------------------------------------------------------- forked children


def fork(act: Any, *arguments: Any) -> tuple[int, Any]:
    """Exit status of a child, and what `act` answered there before the child ran its exit handlers."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(CHILD_SECONDS)
            os.write(write, json.dumps(act(*arguments)).encode())
            atexit._run_exitfuncs()  # what sys.exit() begins with; destructors of torch may hang in a fork
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    with open(read, "rb") as answer:
        text = answer.read()
    return os.waitpid(child, 0)[1], json.loads(text or b"null")


def use_the_model(group: Any, inherited: list[Any]) -> list[str]:
    """What a worker may do with the buffer and the handle that it inherited: the errors that it meets, and the
    destructors that run."""
    said, x = [], rows()

    def combine() -> None:
        buffer, handle = inherited
        buffer.combine(torch.ones(handle.num_recv_tokens, len(x[0])), handle)

    for call in (lambda: send(group, x), combine):
        try:
            call()
        except EPError as error:
            said.append(f"{type(error).__name__}: {error.what}")
    x.sum().backward()
    torch.optim.SGD([x], lr=0.1).step()
    ReferenceBuffer.__del__ = lambda self: said.append("a destructor runs")  # type: ignore[attr-defined]
    inherited.clear()
    pool.destroy_buffers(group)
    pool.destroy_buffers()
    gc.collect()
    return said


def send(group: Any, x: torch.Tensor) -> Any:
    topk_idx = torch.zeros(len(x), 1, dtype=torch.int64)
    return fused_dispatch(x, topk_idx, torch.ones(topk_idx.shape), stalls.EXPERTS, group)[4]


def found_something(counts: dict[int, int]) -> EPError:
    return EPError(f"counted {counts}")


@isolated
def have_a_worker(group: Any, folder: str) -> dict[str, Any]:
    """Rank 0 forks one. What it and its watcher were like afterwards."""
    file, votes = Path(folder, str(group.rank())), []

    def vote(self: Any) -> None:
        votes.append(everyone_arrives(self.group, "teardown with a worker", HANG if os.getpid() == rank_process else 1))

    rank_process, destroy = os.getpid(), ReferenceBuffer.destroy
    ReferenceBuffer.destroy = vote  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    try:
        with standard_error_in(file):
            stalls.start(LIMIT)
            inherited: list[Any] = [None, send(group, rows())]
            inherited[0] = pool.find(group)
            check = DeviceCheck(found_something, torch.device("cpu"), group)
            check.add(torch.ones(1))
            watch, process = inherited[0].watch, inherited[0].watch.client.process
            if group.rank() == 0:
                gc.collect()  # or the child would find process groups in cycles, whose threads it does not have
                before = list(watch.call_log.cells)
                found["status"], found["said"] = fork(use_the_model, group, inherited)
                found["written"] = list(watch.call_log.cells) != before
            dist.barrier(group)
            check.reset()
            watch.client.report_failure(RuntimeError("a test"))
            send(group, rows())
            pool.destroy_buffers()
            found["calls"], found["ended"] = list(watch.call_log.cells[ENTERED : LEFT + 1]), process.poll()
    finally:
        ReferenceBuffer.destroy = destroy  # type: ignore[method-assign]
    return found | {"votes": votes, "reports": file.read_text()}


def test_a_forked_child_leaves_everything_to_its_parent(tmp_path: Path) -> None:
    """It finds no buffer, so that it cannot end the watcher, vote in a teardown or write down a call of its own."""
    answers = run_ranks(2, have_a_worker, str(tmp_path), fresh=True)  # with nothing of other tests in their heaps
    for rank, found in enumerate(answers):
        assert found["votes"] == [True], "of the rank alone, and all ranks came"
        assert found["calls"] == [2, 2] and found["ended"] == 0
        assert HEAD in found["reports"] and "failed with RuntimeError: a test" in found["reports"], rank
    assert answers[0]["status"] == 0 and not answers[0]["written"]
    assert len(answers[0]["said"]) == 2, answers[0]["said"]
    for error in answers[0]["said"]:
        assert error.startswith("ClosedError: this process was forked from a rank"), error


# ----------------------------------------------------------------------------------------- a watcher that has no rank

STARTS_A_WATCHER = """
import os, subprocess, sys
program, gate, task, *files = sys.argv[1:]
wait = f"import os; os.read({gate}, 1); "
subprocess.Popen(
    [sys.executable, "-I", "-S", "-c", wait + program.replace("PARENT", str(os.getpid()))],
    stdin=int(task), pass_fds=[int(gate), *map(int, files)],
)
"""


@pytest.mark.parametrize("has_task", [False, True], ids=["before its task", "after its task"])
def test_a_watcher_ends_whose_rank_was_killed_while_it_started(has_task: bool, tmp_path: Path) -> None:
    """The rank is gone before the watcher's first look at it, while another process (here: this one) holds the other
    end of its line, as a fork of the rank would."""
    with contextlib.ExitStack() as stack:
        record, stacks = (stack.enter_context(open(tmp_path / name, "w+b")) for name in ("record", "stacks"))
        record.truncate(LOG_BYTES)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        files = [record.fileno(), stacks.fileno(), listener.fileno()]
        task = Task(
            **{"rank": 0, "host": "here", "seconds": LIMIT, "token": "word", "peers": {}, "main_thread": 0},
            **{"stack_signal": 0, "call_log": files[0], "stacks": files[1], "listener": files[2]},
        )
        words = json.dumps(dataclasses.asdict(task)).encode()
        (gate, open_gate), (task_end, line_end) = os.pipe(), os.pipe()
        stack.callback(os.close, line_end)
        if has_task:
            os.write(line_end, words)
        program = client.program(len(words), 12345).replace("12345", "PARENT")
        command = [sys.executable, "-I", "-S", "-c", STARTS_A_WATCHER, program, *map(str, (gate, task_end, *files))]
        rank = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[gate, task_end, *files])
        os.close(gate)
        os.close(task_end)
        assert rank.wait(HANG) == 0
        os.close(open_gate)  # only now the watcher starts
        rank.communicate(timeout=HANG)  # until the watcher, which has inherited the pipe, has ended


# --------------------------------------------------------------------------------------------- where a watcher listens


class NamedStore(dist.TCPStore):
    """A store that the ranks have reached by the name of its host."""

    host = "trainer-0"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, loopback is one address")
@pytest.mark.parametrize(("name", "announced"), [("trainer-0", "trainer-0"), ("localhost", "127.0.0.1")])
def test_a_host_whose_name_is_loopback_announces_its_name(
    name: str, announced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian's /etc/hosts has 127.0.1.1 for a host's own name, where other hosts have its address in the network: here
    another address of loopback, on which a socket that listens on 127.0.0.1 hears nothing."""
    addresses = {name: "127.0.1.1"}
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *args, **more: resolve(addresses.get(host, host), *args, **more)
    )
    monkeypatch.setattr(NamedStore, "host", name)
    store = NamedStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = SimpleNamespace(size=lambda: 2, get_group_store=lambda: dist.PrefixStore("group", store))
    rank = rendezvous.Rendezvous(group, LIMIT)
    assert rank.address is not None
    address, port, _ = rank.address
    with rank.listener:
        assert address == announced
        addresses[name] = "127.0.0.2"  # what the name is on another host
        if name == "trainer-0":
            socket.create_connection((address, port), HANG).close()
        else:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), HANG)
