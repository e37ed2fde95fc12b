"""When a call begins and ends: on the host, or in the order of a CUDA stream, where it ends after it has returned."""

from __future__ import annotations

import time
from typing import Any

import torch

from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.watchdog.record import DONE, MARKED, RING, Record


class HostClock:
    """For buffers whose calls return when they are done."""

    def now(self) -> float:
        return time.monotonic()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def mark(self, number: int) -> None:
        """Leaving the call was its end."""

    def close(self) -> None:
        """Nothing to release."""


class GpuClock:
    """For calls that only queue their kernels. Behind them a copy of 8 bytes is queued, by which the GPU itself writes
    into the shared record which call it has finished. So nobody polls, and no thread of ours calls CUDA, which could
    break the capture of a CUDA graph."""

    def __init__(self, record: Record):
        self._record, self._cells = record, torch.frombuffer(record.page, dtype=torch.int64)
        code = int(torch.cuda.cudart().cudaHostRegister(self._cells.data_ptr(), self._cells.nbytes, 0))
        if code:
            raise UnavailableError(
                f"the GPU cannot write to the watchdog's record: cudaHostRegister answers {code}",
                needed="shared memory that CUDA can register",
                fix="set MCORE_DEEPEP_V2_WATCHDOG_SECS=0 to train without the watchdog",
            )
        self._done = self._cells[DONE : DONE + 1]
        self._numbers = torch.arange(RING, device="cuda").split(1)

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def mark(self, number: int) -> None:
        """Queue the word that call `number` is done."""
        self._record.cells[MARKED] = number
        self._done.copy_(self._numbers[number % RING], non_blocking=True)

    def close(self) -> None:
        """Take the record away from CUDA; where the GPU still has to write to it, both stay until the process ends."""
        if self._record.pending():
            _unfinished.append(self)
        else:
            torch.cuda.cudart().cudaHostUnregister(self._cells.data_ptr())


_unfinished: list[GpuClock] = []
