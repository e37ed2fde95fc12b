"""The rank's side of the watchdog: logs each call of a buffer, for the rank's watcher to read.

A call costs a few stores into shared memory and, on a GPU, a copy of 8 bytes after it. Calls that a CUDA graph captures
are not logged: a replay would write the numbers of the captured calls again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from megatron_ep_v2.buffers.contract import Buffer, Combined, DeferringBuffer, Dispatched, Handle, Payload, Transfer
from megatron_ep_v2.buffers.pending import Pending, Starter
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.watchdog.call_log import (
    BACKWARD_OF_COMBINE,
    BACKWARD_OF_DISPATCH,
    EXPERT_GRADIENTS,
    EXPERT_WEIGHTS,
    FORWARD_COMBINE,
    FORWARD_DISPATCH,
    LEFT,
    LOG_BYTES,
    RECOMPUTED_DISPATCH,
    SYNC_FREE_DISPATCH,
    CallLog,
)
from megatron_ep_v2.watchdog.client import WatcherClient, shared_file
from megatron_ep_v2.watchdog.completion import Clock, GpuClock, HostClock
from megatron_ep_v2.watchdog.rendezvous import Rendezvous
from megatron_ep_v2.watchdog.watcher import Address

logger = logging.getLogger("megatron_ep_v2")

T = TypeVar("T")


def watch(buffer: Buffer, rendezvous: Rendezvous, addresses: Sequence[Address | None], hosts: Sequence[str]) -> Buffer:
    """Wrap a buffer so that its calls are watched; returns the buffer itself without a watchdog.

    Args:
        buffer: This rank's.
        rendezvous: This rank's.
        addresses, hosts: Of the group's ranks, in order.
    """
    if rendezvous.address is None:
        return buffer
    try:
        return cast(Buffer, WatchedBuffer(buffer, Watch(rendezvous, addresses, hosts)))
    except OSError as error:
        logger.warning("rank %d has no watchdog, because no process can be started: %s", dist.get_rank(), error)
        return buffer


class WatchedBuffer(Starter):
    """A buffer whose dispatches, combines and transfers of experts are logged; other attributes, and the arguments that
    it does not read, are the wrapped buffer's."""

    def __init__(self, buffer: Buffer, watch: Watch):
        self.buffer, self.watch = buffer, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.buffer, name)

    def dispatch(
        self, x: Payload, **arguments: Any
    ) -> tuple[Payload, torch.Tensor | None, torch.Tensor | None, Handle, object]:
        """See `contract.Buffer.dispatch`."""
        self._finish_started()
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
        vars(answer[3])["moe_call"] = moe_call  # all calls of a layer have this handle
        return answer

    def start_dispatch(self, x: Payload, **arguments: Any) -> Pending[Dispatched]:
        """See `contract.DeferringBuffer.start_dispatch`. Logged as one dispatch."""
        rows, handle = x[0] if isinstance(x, tuple) else x, arguments.get("handle")
        start = cast(DeferringBuffer, self.buffer).start_dispatch
        if handle is not None:
            return self._logged(BACKWARD_OF_COMBINE, _moe_call(handle), rows, lambda: start(x, **arguments))
        moe_call = (self.watch.moe_calls + 1, rows.shape[0] if rows.dim() else 0)
        pending = self._logged(FORWARD_DISPATCH, moe_call, rows, lambda: start(x, **arguments), first=True)
        self.watch.moe_calls += 1
        return pending

    def start_combine(
        self, x: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None = None, **arguments: Any
    ) -> Pending[Combined]:
        """See `contract.DeferringBuffer.start_combine`. Logged as one combine."""
        start = cast(DeferringBuffer, self.buffer).start_combine
        kind = FORWARD_COMBINE if topk_weights is None else BACKWARD_OF_DISPATCH
        return self._logged(kind, _moe_call(handle), x, lambda: start(x, handle, topk_weights, **arguments))

    def _logged(
        self,
        kind: int,
        moe_call: tuple[int, int],
        rows: torch.Tensor,
        start: Callable[[], Pending[T]],
        first: bool = False,
    ) -> Pending[T]:
        """A call that is started and logged: it is under way while it is started and while it is waited for. What the
        host does in between, however long, keeps no rank waiting; and it may never wait, after an error.

        Args:
            first: A dispatch without a handle, at whose end the host has waited for the counts.
        """
        self._finish_started()
        watch = self.watch
        clock = watch.clock or watch.set_clock(rows, self.buffer.comm_stream)
        watch.enter(kind, *moe_call)
        try:
            pending = start()
        except BaseException as error:
            watch.fail(error)
            raise
        watch.leave()

        def finish() -> T:
            watch.call_log.wait()  # of this call: every other one finishes it first
            try:
                answer = pending.wait()
            except BaseException as error:
                watch.fail(error)
                raise
            number = watch.leave()
            if first:
                vars(cast(Dispatched, answer)[3])["moe_call"] = moe_call
            else:
                clock.mark(number)
            return answer

        return self._start(finish)

    def combine(
        self, x: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None = None, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, object]:
        """See `contract.Buffer.combine`."""
        self._finish_started()
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

    def prefetch_weights(self, *arguments: Any) -> Transfer:
        """See `contract.RedundantBuffer.prefetch_weights`."""
        return self._transfer(EXPERT_WEIGHTS, self.buffer.prefetch_weights, arguments)  # type: ignore[attr-defined]

    def reduce_grads(self, *arguments: Any) -> Transfer:
        """See `contract.RedundantBuffer.reduce_grads`."""
        return self._transfer(EXPERT_GRADIENTS, self.buffer.reduce_grads, arguments)  # type: ignore[attr-defined]

    def _transfer(self, kind: int, call: Callable[..., Transfer], arguments: tuple[Any, ...]) -> Transfer:
        """A transfer of redundant experts, logged with the last forward dispatch's number. Follows a dispatch."""
        self._finish_started()
        watch = self.watch
        watch.enter(kind, watch.moe_calls, 0)
        try:
            transfer = call(*arguments)
        except BaseException as error:
            watch.fail(error)
            raise
        number = watch.leave()
        if watch.clock is not None:
            watch.clock.mark(number)
        return transfer

    def destroy(self) -> None:
        """Destroy the buffer, then end the watcher: the ranks may have to wait for each other in the former."""
        self.buffer.destroy()
        self.watch.stop()


class Watch:
    """One rank's call log, and its connection to the watcher that reads it.

    Attributes:
        step: Number of the optimizer's step, from 1.
        moe_calls: Forward dispatches in this step.
        number: Number of the last call.
        clock: Measures when calls begin and end; None before the first one.
    """

    def __init__(self, rendezvous: Rendezvous, addresses: Sequence[Address | None], hosts: Sequence[str]):
        self.step, self.moe_calls, self.number = 1, 0, 0
        self.clock: Clock | None = None
        with shared_file() as memory:
            os.ftruncate(memory.fileno(), LOG_BYTES)
            self.call_log = CallLog(memory.fileno())
            self.client = WatcherClient(rendezvous, addresses, hosts, memory.fileno())
        self._hook = register_optimizer_step_post_hook(self._count_step)

    def set_clock(self, rows: torch.Tensor, comm_stream: torch.cuda.Stream | None) -> Clock:
        """At the first call, choose the clock for the device of these rows and the stream of the buffer's kernels."""
        self.clock = GpuClock(self.call_log, comm_stream) if rows.is_cuda else HostClock()
        return self.clock

    def enter(self, kind: int, moe_call: int, tokens: int) -> None:
        """Log that a call begins."""
        self.number = self.call_log.enter(kind, self.step, moe_call, tokens)

    def leave(self) -> int:
        """Log that the call has returned; returns its number."""
        self.call_log.cells[LEFT] = self.number
        return self.number

    def fail(self, error: BaseException) -> None:
        """Log that the call has raised."""
        if isinstance(error, EPError):  # refused, and the error says why
            self.call_log.retract()
            return
        # A lost connection or deep_ep's time-out, which name no rank. No rank keeps this one from its memory.
        if isinstance(error, RuntimeError) and not isinstance(error, torch.cuda.OutOfMemoryError):
            self.client.report_failure(error)
        self.leave()

    def stop(self) -> None:
        """End the watcher. A second call does nothing."""
        if self.client.process is None:
            return
        self._hook.remove()
        self.client.close()
        if self.clock is not None:
            self.clock.close()

    def leave_to_parent(self) -> None:
        """In a forked child: log calls to private memory from now on; the watcher stays with the rank that it
        watches."""
        self.call_log = CallLog(-1)
        self.client.leave_to_parent()

    def _count_step(self, *_: object) -> None:
        """After each optimizer's step. Several steps without a MoE call between them count as one."""
        self.step += self.moe_calls > 0
        self.moe_calls = 0


def _moe_call(handle: Handle) -> tuple[int, int]:
    """(number of the handle's dispatch in its step, tokens); zeros if the dispatch was not watched."""
    return getattr(handle, "moe_call", (0, 0))


def _captured(rows: torch.Tensor) -> bool:
    """Whether a CUDA graph is capturing the calls on these rows."""
    return rows.is_cuda and torch.cuda.is_current_stream_capturing()
