"""The rank's side of the watchdog: it writes down each call of a buffer, and has a watcher beside it that reads.

A call costs a few stores into shared memory and, on a GPU, a copy of 8 bytes behind it. Calls that a CUDA graph
captures are not written down: what is recorded then would be replayed, with the numbers of the captured calls.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from megatron_ep_v2.buffers.contract import Buffer, Payload
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.watchdog.call_log import (
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
from megatron_ep_v2.watchdog.client import Line, shared_file
from megatron_ep_v2.watchdog.completion import GpuClock, HostClock
from megatron_ep_v2.watchdog.rendezvous import Meeting

logger = logging.getLogger("megatron_ep_v2")


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
        rows = x[0] if isinstance(x, tuple) else x
        if _captured(rows):
            return self.buffer.dispatch(x, **arguments)
        watch, handle = self.watch, arguments.get("handle")
        clock = watch.clock or watch.set_clock(rows, self.buffer.comm_stream)
        if handle is not None:
            kind = BACKWARD_OF_COMBINE if arguments.get("topk_weights") is None else RECOMPUTED_DISPATCH
            watch.enter(kind, *_moe_call(handle))
            try:
                answer = self.buffer.dispatch(x, **arguments)
            except BaseException as error:
                watch.fail(error)
                raise
            clock.mark(watch.leave())
            return answer
        moe_call = (watch.moe_calls + 1, rows.shape[0] if rows.dim() else 0)
        waits = arguments.get("do_cpu_sync", True)
        timed = clock.start() if (watch.step + watch.moe_calls) % clock.every == 0 else None
        watch.enter(FORWARD_DISPATCH if waits else SYNC_FREE_DISPATCH, *moe_call)
        try:
            answer = self.buffer.dispatch(x, **arguments)
        except BaseException as error:
            watch.fail(error)
            raise
        number = watch.leave()
        if not waits:
            clock.mark(number)
        if timed is not None:
            clock.stop(number, timed)
        watch.moe_calls += 1
        vars(answer[3])["moe_call"] = moe_call  # the handle goes through all calls of a layer
        return answer

    def combine(self, x: torch.Tensor, handle: Any, topk_weights: torch.Tensor | None = None, **arguments: Any) -> Any:
        """See `contract.Buffer.combine`."""
        if _captured(x):
            return self.buffer.combine(x, handle, topk_weights, **arguments)
        watch = self.watch
        clock = watch.clock or watch.set_clock(x, self.buffer.comm_stream)
        watch.enter(FORWARD_COMBINE if topk_weights is None else BACKWARD_OF_DISPATCH, *_moe_call(handle))
        try:
            answer = self.buffer.combine(x, handle, topk_weights, **arguments)
        except BaseException as error:
            watch.fail(error)
            raise
        clock.mark(watch.leave())
        return answer

    def destroy(self) -> None:
        """The buffer first: its ranks may have to wait for each other."""
        self.buffer.destroy()
        self.watch.stop()


class Watch:
    """What one rank writes down about its calls, and its line to the watcher that reads it.

    Attributes:
        step: Counted by the optimizers' steps, from 1.
        moe_calls: Forward dispatches in this step.
        number: Of the last call.
        clock: When calls begin and end; None before the first one.
    """

    def __init__(self, meeting: Meeting, addresses: Sequence[Any], hosts: Sequence[str]):
        self.step, self.moe_calls, self.number = 1, 0, 0
        self.clock: Any = None
        with shared_file() as memory:
            os.ftruncate(memory.fileno(), RECORD_BYTES)
            self.record = Record(memory.fileno())
            self.line = Line(meeting, addresses, hosts, memory.fileno())
        self._hook = register_optimizer_step_post_hook(self._count_step)

    def set_clock(self, rows: torch.Tensor, comm_stream: torch.cuda.Stream | None) -> Any:
        """At the first call: the clock for the device of these rows, and the stream of the buffer's kernels."""
        self.clock = GpuClock(self.record, comm_stream) if rows.is_cuda else HostClock()
        return self.clock

    def enter(self, kind: int, moe_call: int, tokens: int) -> None:
        """Before a call."""
        self.number = self.record.enter(kind, self.step, moe_call, tokens)

    def leave(self) -> int:
        """After it. Its number."""
        self.record.cells[LEFT] = self.number
        return self.number

    def fail(self, error: BaseException) -> None:
        """After a call that raised."""
        if isinstance(error, EPError):  # refused, and the error says why
            self.record.retract()
            return
        if isinstance(error, RuntimeError):  # a lost connection, or deep_ep's own limit: neither names a rank
            self.line.report_failure(error)
        self.leave()

    def stop(self) -> None:
        """End the watcher. Harmless a second time."""
        if self.line.process is None:
            return
        self._hook.remove()
        self.line.close()
        if self.clock is not None:
            self.clock.close()

    def leave_to_parent(self) -> None:
        """In a forked child: from now on a call here is written into memory of its own, and the watcher stays with the
        rank that it watches."""
        self.record = Record(-1)
        self.line.leave_to_parent()

    def _count_step(self, *_: Any) -> None:
        """After each optimizer's step; several without a MoE call between them are one."""
        self.step += self.moe_calls > 0
        self.moe_calls = 0


def _moe_call(handle: Any) -> tuple[int, int]:
    """The number of a handle's dispatch in its step, and its tokens. Zeros if nobody watched it."""
    return getattr(handle, "moe_call", (0, 0))


def _captured(rows: torch.Tensor) -> bool:
    """Whether a CUDA graph is recording what is done with these rows."""
    return rows.is_cuda and torch.cuda.is_current_stream_capturing()
