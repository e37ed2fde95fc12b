"""The watchdog's record by itself, and who writes it on a GPU: a stand-in for CUDA's driver tells what is written."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ep_v2.buffers.pending import Pending
from megatron_ep_v2.errors import ClosedError, UnavailableError
from megatron_ep_v2.watchdog import completion, watched_buffer
from megatron_ep_v2.watchdog.call_log import (
    DONE,
    ENTERED,
    FORWARD_COMBINE,
    LEFT,
    LOG_BYTES,
    MARKED,
    NUMBERS,
    SYNC_FREE_DISPATCH,
    CallLog,
)


@pytest.fixture
def record(tmp_path: Path) -> CallLog:
    path = tmp_path / "record"
    path.write_bytes(bytes(LOG_BYTES))
    with path.open("r+b") as file:
        return CallLog(file.fileno())


def test_the_record_knows_the_first_call_that_has_not_finished(record: CallLog) -> None:
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
    assert record.pending() == 4, "the GPU is later than the host"
    record.cells[DONE] = 4
    assert record.pending() == 5
    record.retract()
    assert record.pending() == 0


def test_calls_that_are_never_marked_are_done_when_they_are_left(record: CallLog) -> None:
    """Those of a buffer on the CPU, however many."""
    record.cells[ENTERED] = record.cells[LEFT] = NUMBERS + 5
    assert record.pending() == 0
    assert record.enter(FORWARD_COMBINE, 1, 7, 40) == record.pending() == NUMBERS + 6


def test_a_sync_free_dispatch_has_not_finished_when_it_was_left(record: CallLog) -> None:
    number = record.enter(SYNC_FREE_DISPATCH, 1, 7, 40)
    record.cells[LEFT] = record.cells[MARKED] = number
    assert record.pending() == number
    record.cells[DONE] = number
    assert record.pending() == 0


class Started:
    """A buffer whose call has arrived at the other ranks when it is started, and is asked what is pending whenever it
    runs. log: Of its rank."""

    comm_stream = None

    def __init__(self, log: CallLog):
        self.log, self.seen, self.error = log, list[int](), None

    def _run(self) -> Any:
        self.seen.append(self.log.pending())
        if self.error is not None:
            raise self.error
        return "rows", None, None, SimpleNamespace(), None

    def start_dispatch(self, *_: Any, **__: Any) -> Pending[Any]:
        self.seen.append(self.log.pending())
        return Pending(self._run)

    start_combine = start_dispatch

    def combine(self, *_: Any, **__: Any) -> Any:
        return self._run()


def watched_by(log: CallLog, buffer: Any) -> watched_buffer.WatchedBuffer:
    rank = object.__new__(watched_buffer.Watch)
    rank.clock, rank.call_log, rank.step, rank.moe_calls = completion.HostClock(), log, 1, 0
    return watched_buffer.WatchedBuffer(buffer, rank)


CALLS = {
    "dispatch": lambda watched: watched.start_dispatch(torch.zeros(3, 4)),
    "cached dispatch": lambda watched: watched.start_dispatch(torch.zeros(3, 4), handle=SimpleNamespace()),
    "combine": lambda watched: watched.start_combine(torch.zeros(3, 4), SimpleNamespace()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_started_call_is_pending_while_it_is_started_and_while_it_is_waited_for(name: str, record: CallLog) -> None:
    """In between the host is busy with something else, or has given the step up: no rank waits for that."""
    buffer = Started(record)
    pending = CALLS[name](watched_by(record, buffer))
    assert record.pending() == 0 and record.cells[ENTERED] == 1
    pending.wait()
    assert buffer.seen == [1, 1] and record.pending() == 0 and record.cells[LEFT] == 1


@pytest.mark.parametrize("name", CALLS)
def test_the_next_call_finishes_a_started_one_and_then_begins(name: str, record: CallLog) -> None:
    buffer = Started(record)
    watched = watched_by(record, buffer)
    CALLS[name](watched)
    watched.combine(torch.zeros(3, 4), SimpleNamespace())  # type: ignore[arg-type]
    assert buffer.seen == [1, 1, 2] and record.pending() == 0 and record.cells[LEFT] == record.cells[ENTERED] == 2


def test_a_started_call_that_was_refused_at_its_end_was_none(record: CallLog) -> None:
    """As after `destroy_buffers()`."""
    buffer = Started(record)
    pending = CALLS["dispatch"](watched_by(record, buffer))
    buffer.error = ClosedError("destroyed")
    with pytest.raises(ClosedError):
        pending.wait()
    assert record.pending() == record.cells[ENTERED] == record.cells[LEFT] == 0


FAILURES = {
    RuntimeError("Connection closed by peer"): True,
    torch.OutOfMemoryError("CUDA out of memory"): False,
}


@pytest.mark.parametrize(("error", "reported"), FAILURES.items(), ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", [*CALLS, "waiting combine"])
def test_a_call_without_memory_is_not_reported_as_one_that_waits_for_a_rank(
    name: str, error: Exception, reported: bool, record: CallLog
) -> None:
    """Nor is the call still under way then."""
    buffer, said = Started(record), []
    watched = watched_by(record, buffer)
    watched.watch.client = SimpleNamespace(report_failure=said.append)  # type: ignore[assignment]
    buffer.error = error
    with pytest.raises(type(error)):
        if name in CALLS:
            CALLS[name](watched).wait()
        else:
            watched.combine(torch.zeros(3, 4), SimpleNamespace())  # type: ignore[arg-type]
    assert said == ([error] if reported else [])
    assert record.pending() == 0 and record.cells[ENTERED] == record.cells[LEFT] == 1


class Driver:
    """Instead of CUDA, and of the one function of it that is loaded: does the copies, keeps what is queued, and
    answers with the code that it is given.

    Attributes:
        queued: In order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, registered: int = 0):
        self.queued: list[tuple[Any, ...]] = []
        self.code = 0
        self.registered: list[int] = []
        driver, arange = self, torch.arange

        class Stream:
            cuda_stream = 55

            def wait_event(self, event: Any) -> None:
                driver.queued.append(("wait", 55, event))

            def synchronize(self) -> None:
                driver.queued.append(("the host waits", 55))

        class Event:
            def record(self, stream: Any) -> None:
                driver.queued.append(("record", stream, self))

        def unregister(address: int) -> None:
            self.registered.remove(address)

        def register(address: int, size: int, flags: int) -> int:
            self.registered += [address] if registered == 0 else []
            return registered

        cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
        monkeypatch.setattr(torch, "arange", lambda number, device: arange(number))
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(completion.ctypes, "CDLL", lambda name: SimpleNamespace(cuMemcpyDtoHAsync_v2=self))

    def __call__(self, to: int, source: int, size: int, stream: int) -> int:
        if self.code == 0:
            ctypes.memmove(to, source, size)
        self.queued.append(("copy", stream, ctypes.c_int64.from_address(source).value))
        return self.code


@pytest.mark.parametrize("comm_stream", [None, "deep_ep's"])
def test_the_gpu_writes_the_number_of_a_call_when_its_kernels_are_done(
    comm_stream: Any, record: CallLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(monkeypatch)
    clock = completion.GpuClock(record, comm_stream)
    assert driver.queued == [("copy", 55, 0), ("the host waits", 55)]
    for number in (7, NUMBERS + 9):
        driver.queued.clear()
        clock.mark(number)
        (_, recorded_in, event), *rest = driver.queued
        assert recorded_in == comm_stream and rest == [("wait", 55, event), ("copy", 55, number % NUMBERS)]
        assert record.cells[MARKED] == number and record.cells[DONE] == number % NUMBERS
    driver.code = 700
    with pytest.raises(RuntimeError, match="fault of a kernel"):
        monkeypatch.setattr(torch.cuda, "check_error", fault_of_a_kernel)
        clock.mark(8)
    assert record.cells[MARKED] == NUMBERS + 9, "nothing was queued"


def test_what_the_gpu_still_has_to_write_to_stays_registered(record: CallLog, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    kept: list[Any] = []
    monkeypatch.setattr(completion, "_unfinished", kept)
    clock = completion.GpuClock(record)
    record.cells[LEFT] = record.enter(FORWARD_COMBINE, 1, 1, 40)
    clock.mark(1)
    record.cells[DONE] = 0  # not yet
    clock.close()
    assert kept == [clock] and len(driver.registered) == 1
    record.cells[DONE] = 1
    clock.close()
    assert not driver.registered


def test_calls_are_marked_after_the_kernels_of_the_buffer(record: CallLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in the stream that is the current one."""
    made: list[tuple[Any, ...]] = []
    clock = SimpleNamespace(every=7, mark=lambda number: None)
    monkeypatch.setattr(watched_buffer, "GpuClock", lambda *arguments: made.append(arguments) or clock)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    rank = object.__new__(watched_buffer.Watch)
    rank.clock, rank.call_log, rank.step = None, record, 1
    buffer: Any = SimpleNamespace(comm_stream="deep_ep's", combine=lambda *arguments: "an answer")
    rows: Any = SimpleNamespace(is_cuda=True)
    watched = watched_buffer.WatchedBuffer(buffer, rank)
    assert [watched.combine(rows, None) for _ in range(2)] == ["an answer"] * 2
    assert made == [(record, "deep_ep's")]


def test_what_the_gpu_writes_begins_again(record: CallLog) -> None:
    """It writes numbers modulo NUMBERS."""
    record.cells[ENTERED] = NUMBERS - 2
    for _ in range(4):
        record.cells[LEFT] = record.cells[MARKED] = record.enter(FORWARD_COMBINE, 1, 1, 40)
    for done, pending in ((NUMBERS - 1, NUMBERS), (0, NUMBERS + 1), (1, NUMBERS + 2), (2, 0)):
        record.cells[DONE] = done
        assert record.pending() == pending


def test_the_gpu_may_be_done_before_the_host_has_written_that_it_will_be(record: CallLog) -> None:
    for _ in range(2):
        record.cells[LEFT] = record.enter(FORWARD_COMBINE, 1, 1, 40)
    record.cells[MARKED], record.cells[DONE] = 1, 2
    assert record.pending() == 0


def fault_of_a_kernel(code: int) -> None:
    raise RuntimeError(f"fault of a kernel: {code}")


@pytest.mark.parametrize(("registered", "code"), [(1, 0), (0, 801)], ids=["not registered", "not copied"])
def test_a_gpu_that_cannot_write(registered: int, code: int, record: CallLog, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, registered)
    driver.code = code
    with pytest.raises(UnavailableError, match=f"cannot write .* answers {registered or code}"):
        completion.GpuClock(record)
    assert not driver.registered


def test_a_machine_without_the_driver(record: CallLog, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    monkeypatch.setattr(completion.ctypes, "CDLL", lambda name: SimpleNamespace())
    with pytest.raises(UnavailableError, match="cannot write to the watchdog's call log"):
        completion.GpuClock(record)
    assert not driver.registered
