"""The watchdog's record by itself, and who writes it on a GPU: a stand-in for CUDA's driver tells what is written."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.watchdog import clocks
from megatron_ep_v2.watchdog.record import (
    DONE,
    ENTERED,
    FORWARD_COMBINE,
    LEFT,
    MARKED,
    NUMBERS,
    RECORD_BYTES,
    SYNC_FREE_DISPATCH,
    Record,
)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    path = tmp_path / "record"
    path.write_bytes(bytes(RECORD_BYTES))
    with path.open("r+b") as file:
        return Record(file.fileno())


def test_the_record_knows_the_first_call_that_has_not_finished(record: Record) -> None:
    assert record.pending() == 0
    for kind in range(4):  # a dispatch, which waits on the host; then three calls that the GPU queues
        assert record.enter(kind, 1, 7, 40) == record.pending() == kind + 1
        record.cells[LEFT] = kind + 1
        assert record.pending() == 0
    assert record.call(3) == [3, 2, 1, 7, 40]
    record.cells[MARKED] = 2
    assert record.pending() == 2, "past the dispatch, which was left"
    record.cells[MARKED] = 4
    record.cells[DONE] = 3
    assert record.pending() == 4
    record.enter(0, 1, 8, 40)
    assert record.pending() == 4, "the GPU is behind the host"
    record.cells[DONE] = 4
    assert record.pending() == 5
    record.retract()
    assert record.pending() == 0


def test_a_sync_free_dispatch_has_not_finished_when_it_was_left(record: Record) -> None:
    number = record.enter(SYNC_FREE_DISPATCH, 1, 7, 40)
    record.cells[LEFT] = record.cells[MARKED] = number
    assert record.pending() == number
    record.cells[DONE] = number
    assert record.pending() == 0


class Driver:
    """In CUDA's place: keeps what is copied in a stream, and answers with the code that it is given.

    Attributes:
        copied: (address, value, bytes, stream) of each copy.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, registered: int = 0):
        self.copied: list[tuple[int, int, int, int]] = []
        self.code = 0
        arange = torch.arange
        monkeypatch.setattr(torch, "arange", lambda number, device: arange(number))
        monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: registered))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the current one")
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
        monkeypatch.setattr(clocks.ctypes, "CDLL", lambda name: SimpleNamespace(cuMemcpyDtoHAsync_v2=self))

    def __call__(self, to: int, source: int, size: int, stream: int) -> int:
        self.copied.append((to, ctypes.c_int64.from_address(source).value, size, stream))
        return self.code


class CommStream:
    """A buffer's stream."""

    cuda_stream = 55

    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)


@pytest.mark.parametrize("own", [False, True], ids=["the current stream", "the stream of the calls"])
def test_the_gpu_is_told_to_write_the_number_of_a_call(
    own: bool, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, comm = Driver(monkeypatch), CommStream()
    clock = clocks.GpuClock(record, cast(Any, comm) if own else None)
    stream = 55 if own else 103
    address = torch.frombuffer(record.page, dtype=torch.int64).data_ptr() + 8 * DONE
    clock.mark(7)
    assert driver.copied == [(address, 0, 8, stream), (address, 7, 8, stream)] and record.cells[MARKED] == 7
    assert comm.waited == (["the current one"] if own else []), "for the numbers that are copied"
    clock.mark(NUMBERS + 9)
    assert driver.copied[-1] == (address, 9, 8, stream) and record.cells[MARKED] == NUMBERS + 9
    driver.code = 700
    with pytest.raises(RuntimeError, match="fault of a kernel"):
        monkeypatch.setattr(torch.cuda, "check_error", fault_of_a_kernel)
        clock.mark(8)
    assert record.cells[MARKED] == NUMBERS + 9, "nothing was queued"


def test_what_the_gpu_writes_begins_anew(record: Record) -> None:
    """It writes numbers modulo NUMBERS."""
    record.cells[ENTERED] = NUMBERS - 2
    for _ in range(4):
        record.cells[LEFT] = record.cells[MARKED] = record.enter(FORWARD_COMBINE, 1, 1, 40)
    for done, pending in ((NUMBERS - 1, NUMBERS), (0, NUMBERS + 1), (1, NUMBERS + 2), (2, 0)):
        record.cells[DONE] = done
        assert record.pending() == pending


def fault_of_a_kernel(code: int) -> None:
    raise RuntimeError(f"fault of a kernel: {code}")


@pytest.mark.parametrize(("registered", "code"), [(1, 0), (0, 801)], ids=["not registered", "not copied"])
def test_a_gpu_that_cannot_write(registered: int, code: int, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, registered)
    driver.code = code
    with pytest.raises(UnavailableError, match=f"cannot write .* answers {registered or code}"):
        clocks.GpuClock(record)


def test_a_machine_without_the_driver(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch)
    monkeypatch.setattr(clocks.ctypes, "CDLL", lambda name: SimpleNamespace())
    with pytest.raises(UnavailableError, match="cannot write to the watchdog's record"):
        clocks.GpuClock(record)
