"""A rank's connection to its watcher, the process that reads the log of the rank's calls."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megatron_ep_v2.watchdog.rendezvous import Rendezvous
from megatron_ep_v2.watchdog.watcher import Address, Task

FAILED_SECONDS = 6.0  # time limit for the report of a call that failed
END_SECONDS = 3.0  # time limit for a watcher to send the others its final answer
STACK_SIGNAL = int(getattr(signal, "SIGRTMIN", signal.SIGUSR2))  # schedulers and launchers use SIGUSR1 and SIGUSR2

_PROGRAM = "import sys; sys.path.insert(0, {!r}); from megatron_ep_v2.watchdog.watcher import main; main({}, {})"


class WatcherClient:
    """Starts the watcher, sends it what happens, and ends it.

    Args:
        rendezvous: This rank's, with an address.
        addresses, hosts: Of the group's ranks, in order.
        call_log: File descriptor of the call log.

    Raises:
        OSError: No process can be started.

    Attributes:
        process: The watcher; None after it was ended.
    """

    def __init__(
        self, rendezvous: Rendezvous, addresses: Sequence[Address | None], hosts: Sequence[str], call_log: int
    ):
        assert rendezvous.address is not None
        ranks, rank = dist.get_process_group_ranks(rendezvous.group), dist.get_rank()
        with rendezvous.listener as listener:
            task = Task(
                rank=rank,
                host=hosts[ranks.index(rank)],
                seconds=rendezvous.seconds,
                token=rendezvous.address[2],
                peers={peer: address for peer, address in zip(ranks, addresses, strict=True) if peer != rank},
                main_thread=threading.main_thread().ident or 0,
                stack_signal=STACK_SIGNAL,
                call_log=call_log,
                stacks=_stack_file().fileno(),
                listener=listener.fileno(),
            )
            self.process: subprocess.Popen[bytes] | None = _start(task)

    def report_failure(self, error: RuntimeError) -> None:
        """Delay an error until the watcher has asked the others and printed its report."""
        assert self.process is not None  # it is ended with the buffer
        to_watcher, from_watcher = _pipes(self.process)
        with contextlib.suppress(OSError):  # without a watcher, the error comes without a report
            to_watcher.write(f"failed with {type(error).__name__}: {error}".partition("\n")[0][:200].encode())
            if select.select([from_watcher], [], [], FAILED_SECONDS)[0]:
                from_watcher.read(64)

    def leave_to_parent(self) -> None:
        """In a forked child: close its copies of the connection, so that only the rank itself holds it. The watcher
        runs on, and the child cannot end it."""
        self._of_parent, self.process = self.process, None  # kept: the destructor of a Popen polls its process
        if self._of_parent is not None:
            for pipe in _pipes(self._of_parent):
                pipe.close()

    def close(self) -> None:
        """End the watcher."""
        process, self.process = self.process, None
        assert process is not None  # `Watch.stop` has looked
        to_watcher, from_watcher = _pipes(process)
        with contextlib.suppress(OSError):
            to_watcher.write(b"bye\n")
        to_watcher.close()
        from_watcher.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def program(size: int, parent: int) -> str:
    """Source that a watcher's interpreter runs; see `watcher.main` for the arguments."""
    return _PROGRAM.format(str(Path(__file__).parents[2]), size, parent)


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """The watcher's standard input and output."""
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def _start(task: Task) -> subprocess.Popen[bytes]:
    """Start a watcher: isolated and without site-packages, to start quickly whatever the job's environment is."""
    words = json.dumps(dataclasses.asdict(task)).encode()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program(len(words), os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        pass_fds=(task.call_log, task.stacks, task.listener),
    )
    _pipes(process)[0].write(words)
    return process


def shared_file() -> IO[bytes]:
    """A file without a name; in memory if the system supports it."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("megatron_ep_v2"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


@functools.cache
def _stack_file() -> IO[bytes]:
    """The file to which this process writes the stacks of its threads on STACK_SIGNAL."""
    file = shared_file()
    faulthandler.register(STACK_SIGNAL, file=file, all_threads=True, chain=False)
    return file
