"""When a call begins and ends: on the host, or in the order of a CUDA stream, where it ends after it has returned."""

from __future__ import annotations

import collections
import ctypes
import time
from typing import Any

import torch

from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.watchdog.call_log import DONE, MARKED, NUMBERS, Record

WAITS_KEPT = 256  # timed forward dispatches, for the summary of arrivals


class HostClock:
    """For buffers whose calls return when they are done.

    Attributes:
        every: One of so many forward dispatches is timed.
    """

    every = 1

    def __init__(self) -> None:
        self._waits: collections.deque[tuple[int, float]] = collections.deque(maxlen=WAITS_KEPT)

    def start(self) -> float:
        """Before a dispatch that is timed."""
        return time.monotonic()

    def stop(self, number: int, start: float) -> None:
        """After it. start: what `start` answered."""
        self._waits.append((number, time.monotonic() - start))

    def waits(self) -> dict[int, float]:
        """Number of the call -> its seconds, for the last dispatches that were timed."""
        return dict(self._waits)

    def mark(self, number: int) -> None:
        """Leaving the call was its end."""

    def close(self) -> None:
        """Nothing to release."""


class GpuClock:
    """For calls that only queue their kernels. Behind them a copy of 8 bytes is queued, by which the GPU itself tells
    the shared record which call it has finished. So nobody polls, and no thread of ours calls CUDA, which could break
    the capture of a CUDA graph.

    A copy, because it has a hardware queue of its own. Where all streams share one for kernels
    (CUDA_DEVICE_MAX_CONNECTIONS=1), a kernel, a memset or a write to memory that waits for the communication holds back
    what other streams have queued behind it, and nothing runs beside the communication. In a stream of its own, because
    a copy may have to wait for larger ones (offloaded activations), and no call shall wait for that.

    A dispatch is timed by two events, used again and again; one of seven is enough for the summary of arrivals.

    Args:
        record: Of this rank.
        comm_stream: Of the calls' kernels; None = the current one at each call.

    Raises:
        UnavailableError: The GPU cannot write to the record.
    """

    every = 7

    def __init__(self, record: Record, comm_stream: torch.cuda.Stream | None = None):
        self._waits: collections.deque[tuple[int, tuple[Any, Any]]] = collections.deque()
        self._record, self._cells = record, torch.frombuffer(record.page, dtype=torch.int64)
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

    def start(self) -> tuple[Any, Any]:
        if len(self._waits) < WAITS_KEPT:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        else:
            _, events = self._waits.popleft()
        events[0].record()
        return events

    def stop(self, number: int, start: tuple[Any, Any]) -> None:
        start[1].record()
        self._waits.append((number, start))

    def waits(self) -> dict[int, float]:
        for _, (_, end) in self._waits:
            end.synchronize()
        return {number: begin.elapsed_time(end) / 1e3 for number, (begin, end) in self._waits}

    def mark(self, number: int) -> None:
        """Queue the word that call `number` is done. An error here is that of some earlier kernel."""
        self._event.record(self._comm_stream)
        self._stream.wait_event(self._event)
        code = self._copy(self._done, self._first + 8 * (number % NUMBERS), 8, self._stream.cuda_stream)
        if code:
            torch.cuda.check_error(code)
        self._record.cells[MARKED] = number

    def close(self) -> None:
        """Take the record away from CUDA; where the GPU still has to write to it, both stay until the process ends."""
        if self._record.pending():
            _unfinished.append(self)
        else:
            torch.cuda.cudart().cudaHostUnregister(self._cells.data_ptr())


_unfinished: list[GpuClock] = []


def _copy_to_host() -> Any:
    """CUDA's `cuMemcpyDtoHAsync(to, from, bytes, stream) -> error code`. torch's own copy takes the host longer."""
    try:
        copy = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoHAsync_v2
    except (OSError, AttributeError) as error:
        raise _cannot_write(str(error)) from error
    copy.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    return copy


def _cannot_write(why: str) -> UnavailableError:
    return UnavailableError(
        f"the GPU cannot write to the watchdog's record: {why}",
        needed="CUDA's driver, and shared memory that it can register",
        fix="set MCORE_DEEPEP_V2_WATCHDOG_SECS=0 to train without the watchdog",
    )
