"""The rank's side of the watchdog: it writes down each call of a buffer, and has a watcher beside it that reads.

A call costs a few stores into shared memory and, on a GPU, a copy of 8 bytes. Calls that a CUDA graph captures are not
written down: what is recorded then would be replayed, with the numbers of the calls that were captured.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import functools
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from megatron_ep_v2.buffers.contract import Buffer, Payload
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.watchdog.clocks import GpuClock, HostClock
from megatron_ep_v2.watchdog.meeting import Meeting
from megatron_ep_v2.watchdog.process import Task
from megatron_ep_v2.watchdog.record import (
    BACKWARD_OF_COMBINE,
    BACKWARD_OF_DISPATCH,
    FORWARD_COMBINE,
    FORWARD_DISPATCH,
    LEFT,
    RECOMPUTED_DISPATCH,
    RECORD_BYTES,
    SYNC_FREE_DISPATCH,
    Record,
)

logger = logging.getLogger("megatron_ep_v2")

WAITS_KEPT = 256  # forward dispatches, for the summary of arrivals
FAILED_SECONDS = 6.0  # for the report of a call that failed
END_SECONDS = 3.0  # for a watcher to take its leave of the others
STACK_SIGNAL = int(getattr(signal, "SIGRTMIN", signal.SIGUSR2))  # schedulers and launchers use SIGUSR1 and SIGUSR2

_PROGRAM = "import sys; sys.path.insert(0, {!r}); from megatron_ep_v2.watchdog.process import main; main({})"


def watch(buffer: Buffer, meeting: Meeting, addresses: Sequence[Any], hosts: Sequence[str]) -> Buffer:
    """The buffer with its calls watched; the buffer itself where there is no watchdog.

    Args:
        buffer: Of this rank.
        meeting: Of this rank.
        addresses, hosts: Of the group's ranks, in order.
    """
    if meeting.address is None:
        return buffer
    try:
        return cast(Buffer, WatchedBuffer(buffer, Watch(meeting, addresses, hosts)))
    except OSError as error:
        logger.warning("rank %d has no watchdog, because no process can be started: %s", dist.get_rank(), error)
        return buffer


class WatchedBuffer:
    """A buffer whose dispatches and combines are written down. Everything else is the buffer's own."""

    def __init__(self, buffer: Buffer, watch: Watch):
        self.buffer, self.watch = buffer, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.buffer, name)

    def dispatch(self, x: Payload, **arguments: Any) -> Any:
        """See `contract.Buffer.dispatch`."""
        watch, handle = self.watch, arguments.get("handle")
        rows = x[0] if isinstance(x, tuple) else x
        if _captured(rows):
            return self.buffer.dispatch(x, **arguments)
        clock = watch.clock or watch.set_clock(rows)
        if handle is not None:
            kind = BACKWARD_OF_COMBINE if arguments.get("topk_weights") is None else RECOMPUTED_DISPATCH
            with watch.call(kind, *_moe_call(handle)):
                answer = self.buffer.dispatch(x, **arguments)
            clock.mark(watch.number)
            return answer
        moe_call = (watch.moe_calls + 1, rows.shape[0] if rows.dim() else 0)
        start, waits = clock.now(), arguments.get("do_cpu_sync", True)
        with watch.call(FORWARD_DISPATCH if waits else SYNC_FREE_DISPATCH, *moe_call):
            answer = self.buffer.dispatch(x, **arguments)
        if not waits:
            clock.mark(watch.number)
        watch.waits.append((watch.number, start, clock.now()))
        watch.moe_calls += 1
        vars(answer[3])["moe_call"] = moe_call  # the handle goes through all calls of a layer
        return answer

    def combine(self, x: torch.Tensor, handle: Any, topk_weights: torch.Tensor | None = None, **arguments: Any) -> Any:
        """See `contract.Buffer.combine`."""
        if _captured(x):
            return self.buffer.combine(x, handle, topk_weights, **arguments)
        watch = self.watch
        clock = watch.clock or watch.set_clock(x)
        kind = FORWARD_COMBINE if topk_weights is None else BACKWARD_OF_DISPATCH
        with watch.call(kind, *_moe_call(handle)):
            answer = self.buffer.combine(x, handle, topk_weights, **arguments)
        clock.mark(watch.number)
        return answer

    def destroy(self) -> None:
        """The buffer first: its ranks may have to wait for each other."""
        self.buffer.destroy()
        self.watch.stop()


class Watch:
    """What one rank writes down about its calls, and its line to the watcher.

    Attributes:
        step: Counted by the optimizers' steps, from 1.
        moe_calls: Forward dispatches in this step.
        waits: (call, begin, end) of the last forward dispatches, as `clock` tells the time.
    """

    def __init__(self, meeting: Meeting, addresses: Sequence[Any], hosts: Sequence[str]):
        assert meeting.address is not None
        self.step, self.moe_calls, self.number = 1, 0, 0
        self.waits: collections.deque[tuple[int, Any, Any]] = collections.deque(maxlen=WAITS_KEPT)
        self.clock: Any = None
        ranks, rank = dist.get_process_group_ranks(meeting.group), dist.get_rank()
        with _shared_file() as memory, meeting.listener as listener:
            os.ftruncate(memory.fileno(), RECORD_BYTES)
            self.record = Record(memory.fileno())
            task = Task(
                rank=rank,
                host=hosts[ranks.index(rank)],
                seconds=meeting.seconds,
                token=meeting.address[2],
                peers={peer: address for peer, address in zip(ranks, addresses, strict=True) if peer != rank},
                main_thread=threading.main_thread().ident or 0,
                stack_signal=STACK_SIGNAL,
                record=memory.fileno(),
                stacks=_stack_file().fileno(),
                listener=listener.fileno(),
            )
            self._process = _start(task)
        self._hook = register_optimizer_step_post_hook(self._count_step)

    def set_clock(self, rows: torch.Tensor) -> Any:
        """At the first call: the clock for the device of these rows."""
        self.clock = GpuClock(self.record) if rows.is_cuda else HostClock()
        return self.clock

    def call(self, kind: int, moe_call: int, tokens: int) -> Watch:
        """`with watch.call(...):` goes around a call."""
        self.number = self.record.enter(kind, self.step, moe_call, tokens)
        return self

    def __enter__(self) -> None:
        """`call` has entered it."""

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if error is not None:
            if isinstance(error, EPError):  # refused, and the error says why
                self.record.retract()
                return
            if isinstance(error, RuntimeError):  # a lost connection, or deep_ep's own limit: neither names a rank
                self._report_failure(error)
        self.record.cells[LEFT] = self.number

    def stop(self) -> None:
        """End the watcher. Harmless a second time."""
        process, self._process = self._process, None
        if process is None:
            return
        self._hook.remove()
        with contextlib.suppress(OSError):
            process.stdin.write(b"bye\n")
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self.clock is not None:
            self.clock.close()

    def _report_failure(self, error: RuntimeError) -> None:
        """Hold an error back until the watcher has asked the others and printed its report."""
        with contextlib.suppress(OSError):  # without a watcher, the error has to do
            self._process.stdin.write(f"failed with {type(error).__name__}: {error}".partition("\n")[0][:200].encode())
            if select.select([self._process.stdout], [], [], FAILED_SECONDS)[0]:
                self._process.stdout.read(64)

    def _count_step(self, *_: Any) -> None:
        """After each optimizer's step; several without a MoE call between them are one."""
        self.step += self.moe_calls > 0
        self.moe_calls = 0


def _start(task: Task) -> Any:
    """Isolated and without site-packages, so that it starts quickly and nothing of the job's environment matters."""
    words = json.dumps(dataclasses.asdict(task)).encode()
    process: Any = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROGRAM.format(str(Path(__file__).parents[2]), len(words))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        pass_fds=(task.record, task.stacks, task.listener),
    )
    process.stdin.write(words)
    return process


def _moe_call(handle: Any) -> tuple[int, int]:
    """The number of a handle's dispatch in its step, and its tokens. Zeros if nobody watched it."""
    return getattr(handle, "moe_call", (0, 0))


def _captured(rows: torch.Tensor) -> bool:
    """Whether a CUDA graph is recording what is done with these rows."""
    return rows.is_cuda and torch.cuda.is_current_stream_capturing()


def _shared_file() -> Any:
    """A file without a name; in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("megatron_ep_v2"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


@functools.cache
def _stack_file() -> Any:
    """Where this process writes the stacks of its threads when it gets STACK_SIGNAL."""
    file = _shared_file()
    faulthandler.register(STACK_SIGNAL, file=file, all_threads=True, chain=False)
    return file
