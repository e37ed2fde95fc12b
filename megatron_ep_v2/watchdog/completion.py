"""Begin and end of a call: on the host, or in the order of a CUDA stream, where a call ends after it has returned."""

from __future__ import annotations

import collections
import ctypes
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch

from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.watchdog.call_log import DONE, MARKED, NUMBERS, CallLog

WAITS_KEPT = 256  # timed forward dispatches, for `stragglers()`
Events: TypeAlias = tuple[torch.cuda.Event, torch.cuda.Event]  # at begin and end


class Clock(Protocol):
    """Measures when calls begin and end.

    Attributes:
        every: One in `every` forward dispatches is timed.
    """

    every: int

    def start(self) -> Any:
        """Begin a timed dispatch; returns what this clock's `stop` needs."""

    def stop(self, number: int, start: Any) -> None:
        """End a timed dispatch. start: From `start()`."""

    def waits(self) -> dict[int, float]:
        """Number of the call -> its seconds, for the last timed dispatches."""

    def mark(self, number: int) -> None:
        """Call `number` has returned."""

    def close(self) -> None:
        """Release what the clock holds."""


class HostClock:
    """Clock for buffers whose calls return when they have finished."""

    every = 1

    def __init__(self) -> None:
        self._waits: collections.deque[tuple[int, float]] = collections.deque(maxlen=WAITS_KEPT)

    def start(self) -> float:
        return time.monotonic()

    def stop(self, number: int, start: float) -> None:
        self._waits.append((number, time.monotonic() - start))

    def waits(self) -> dict[int, float]:
        return dict(self._waits)

    def mark(self, number: int) -> None:
        """Do nothing: the call has finished."""

    def close(self) -> None:
        """Do nothing."""


class GpuClock:
    """Clock for calls that only queue their kernels. After each call a copy of 8 bytes is queued, with which the GPU
    writes the number of the finished call to the call log. So nothing polls, and no extra thread calls CUDA, which
    could break the capture of a CUDA graph.

    A copy, because copies have their own hardware queue. If all streams share one queue for kernels
    (CUDA_DEVICE_MAX_CONNECTIONS=1), a kernel, a memset or a write to memory that waits for the communication blocks
    what other streams queue after it, and nothing overlaps with the communication. In its own stream, because the copy
    may have to wait for larger ones (offloaded activations), and no call may wait for those.

    A dispatch is timed by two events, which are reused; one in seven dispatches is enough for `stragglers()`.

    Args:
        call_log: This rank's.
        comm_stream: The stream of the calls' kernels; None = the current one at each call.

    Raises:
        UnavailableError: The GPU cannot write to the call log.
    """

    every = 7

    def __init__(self, call_log: CallLog, comm_stream: torch.cuda.Stream | None = None):
        self._waits: collections.deque[tuple[int, Events]] = collections.deque()
        self._call_log, self._cells = call_log, torch.frombuffer(call_log.page, dtype=torch.int64)
        self._done = self._cells.data_ptr() + 8 * DONE
        self._comm_stream, self._stream, self._event = comm_stream, torch.cuda.Stream(), torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._numbers = torch.arange(NUMBERS, device="cuda")
        self._first = self._numbers.data_ptr()
        self._copy = _copy_to_host()
        code = int(torch.cuda.cudart().cudaHostRegister(self._cells.data_ptr(), self._cells.nbytes, 0))
        if code:
            raise _cannot_write(f"cudaHostRegister answers {code}")
        code = self._copy(self._done, self._first, 8, self._stream.cuda_stream)
        if code:
            torch.cuda.cudart().cudaHostUnregister(self._cells.data_ptr())
            raise _cannot_write(f"cuMemcpyDtoHAsync answers {code}")
        self._stream.synchronize()

    def start(self) -> Events:
        if len(self._waits) < WAITS_KEPT:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        else:
            _, events = self._waits.popleft()
        events[0].record()
        return events

    def stop(self, number: int, start: Events) -> None:
        start[1].record()
        self._waits.append((number, start))

    def waits(self) -> dict[int, float]:
        for _, (_, end) in self._waits:
            end.synchronize()
        return {number: begin.elapsed_time(end) / 1e3 for number, (begin, end) in self._waits}

    def mark(self, number: int) -> None:
        """Queue the copy that marks call `number` as finished. An error here comes from an earlier kernel."""
        self._event.record(self._comm_stream)
        self._stream.wait_event(self._event)
        code = self._copy(self._done, self._first + 8 * (number % NUMBERS), 8, self._stream.cuda_stream)
        if code:
            torch.cuda.check_error(code)
        self._call_log.cells[MARKED] = number

    def close(self) -> None:
        """Unregister the call log with CUDA; if the GPU still has to write to it, keep it until the process ends."""
        if self._call_log.pending():
            _unfinished.append(self)
        else:
            torch.cuda.cudart().cudaHostUnregister(self._cells.data_ptr())


_unfinished: list[GpuClock] = []


def _copy_to_host() -> Callable[[int, int, int, int], int]:
    """CUDA's `cuMemcpyDtoHAsync(to, from, bytes, stream) -> error code`, which costs the host less than torch's
    copy."""
    try:
        copy = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoHAsync_v2
    except (OSError, AttributeError) as error:
        raise _cannot_write(str(error)) from error
    copy.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    return copy


def _cannot_write(why: str) -> UnavailableError:
    return UnavailableError(
        f"the GPU cannot write to the watchdog's call log: {why}",
        needed="CUDA's driver, and shared memory that it can register",
        fix="set MCORE_DEEPEP_V2_WATCHDOG_SECS=0 to train without the watchdog",
    )
