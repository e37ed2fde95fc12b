"""When a step is captured and replayed, with stand-ins for CUDA's graphs: a replay runs the function again on the
inputs of the capture. tests/gpu/test_step_graph.py has the real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ep_v2 import sync_free
from megatron_ep_v2.bench.entry import noted
from megatron_ep_v2.buffers.pool import destroy_buffers
from megatron_ep_v2.errors import CaptureError
from megatron_ep_v2.megatron.qwen3_moe.step_graph import Capture, StepGraph
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer
from tests.helpers.graphed_steps import GPU_SHAPE, Place, every_kind
from tests.helpers.harness import isolated, run_ranks


class Recorder:
    """A function of micro-batches, and how it was called.

    Attributes:
        calls: "eager", "capture" or "replay", in order.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.capturing = False
        self.captured: Callable[[], torch.Tensor] | None = None

    def __call__(self, micro_batches: Any) -> torch.Tensor:
        self.calls.append("capture" if self.capturing else "eager")
        if not self.capturing:
            return sum(tokens.sum() for tokens in micro_batches)
        result = torch.zeros((), dtype=torch.int64)
        self.captured = lambda: result.copy_(sum(tokens.sum() for tokens in micro_batches))
        return result

    def replay(self) -> None:
        self.calls.append("replay")
        assert self.captured is not None
        self.captured()

    @contextlib.contextmanager
    def capture(self, *_: Any, **__: Any) -> Iterator[None]:
        self.capturing = True
        yield
        self.capturing = False


@pytest.fixture
def steps() -> Iterator[tuple[Recorder, StepGraph, list[tuple[int, ...]]]]:
    function, rooms = Recorder(), [(100,)]
    graph = mock.Mock(replay=function.replay)
    names = {
        "CUDAGraph": lambda: graph,
        "graph": function.capture,
        "synchronize": lambda: None,
        "current_stream": lambda: None,
    }
    names |= {"empty_cache": lambda: None, "memory_reserved": iter(range(0, 1000, 7)).__next__}
    with mock.patch.multiple(torch.cuda, **names), mock.patch.object(sync_free, "rooms", lambda: rooms[0]):
        yield function, StepGraph(function, torch.device("cpu")), rooms


def batch(*sizes: int, value: int = 1) -> list[torch.Tensor]:
    return [torch.full((1, size), value) for size in sizes]


def test_the_first_step_is_eager_and_later_ones_are_replayed(steps: Any) -> None:
    function, graph, _ = steps
    assert [int(graph.run(batch(4, 4, value=value))) for value in (1, 2, 3)] == [8, 16, 24]
    assert function.calls == ["eager", "capture", "replay", "replay"]
    assert [taken.pool_bytes for taken in graph.captures] == [7]


@pytest.mark.parametrize("other", [batch(4), batch(4, 5), batch(4, 4, 4), [t.int() for t in batch(4, 4)]])
def test_other_micro_batches_are_captured_again(steps: Any, other: list[torch.Tensor]) -> None:
    function, graph, _ = steps
    for micro_batches in (batch(4, 4), batch(4, 4), other, other, batch(4, 4)):
        assert int(graph.run(micro_batches)) == sum(tokens.numel() for tokens in micro_batches)
    assert function.calls == ["eager", "capture", "replay", "eager", "capture", "replay", "eager"]
    assert len(graph.captures) == 2


def test_a_step_that_waits_for_the_device_is_refused_by_name(steps: Any) -> None:
    _, graph, _ = steps
    graph.run(batch(4))
    graph.function = mock.Mock(side_effect=RuntimeError("operation not permitted when stream is capturing"))
    with pytest.raises(CaptureError, match="RuntimeError: operation not permitted") as caught:
        graph.run(batch(4))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(CaptureError), noted():  # not the reason of one row: no other can be measured any more
        raise caught.value


def test_other_room_for_rows_is_captured_again(steps: Any) -> None:
    function, graph, rooms = steps
    for room in ((100,), (100,), (150,), (150,), (150,), (150, 80)):
        rooms[0] = room
        graph.run(batch(4))
    assert function.calls == ["eager", "capture", "replay", "eager", "capture", "replay", "replay", "eager"]


def test_the_graph_goes_with_the_buffers_that_it_uses(steps: Any) -> None:
    function, graph, _ = steps
    for _ in range(3):
        graph.run(batch(4))
    destroy_buffers()
    assert graph._graph is graph._result is None
    assert int(graph.run(batch(4))) == int(graph.run(batch(4))) == 4
    assert function.calls == ["eager", "capture", "replay", "replay", "eager", "capture", "replay"]


def test_the_callers_stream_waits_for_the_steps_own_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller then runs uses the same buffer and the same counters."""
    waits = list[tuple[Any, Any]]()

    class Stream:
        def wait_stream(self, other: Any) -> None:
            waits.append((self, other))

    callers, own = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: callers)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    trainer: Any = SimpleNamespace(_stream=own)
    with pytest.raises(ValueError), Trainer._own_stream(trainer):
        raise ValueError
    assert waits == [(own, callers), (callers, own)]


SHAPE = replace(GPU_SHAPE, hidden_size=64, kv_channels=16, ffn_hidden_size=128, moe_ffn_hidden_size=32, seq_length=32)


class Replayed:
    """Runs the function of a StepGraph again."""

    def __init__(self, graph: StepGraph):
        self.graph = graph

    def replay(self) -> None:
        self.graph._result = self.graph.function(self.graph._inputs)


def capture(self: StepGraph, micro_batches: Any) -> Replayed:
    self._inputs = [torch.empty_like(tokens) for tokens in micro_batches]
    self.captures.append(Capture(seconds=0.0, pool_bytes=0))
    self._result = torch.zeros(())
    return Replayed(self)


@isolated
def steps_of_every_kind(group: Any, graph: bool) -> dict[str, Any]:
    place = Place(SHAPE, {"buffer": "reference", "reference_strict": False}, "cpu", "fp32")
    with mock.patch.object(StepGraph, "_capture", capture):
        return every_kind(group, place, graph, False)


@pytest.mark.slow
def test_replayed_steps_of_the_trainer_are_eager_steps() -> None:
    """With overflows, accumulation, an evaluation and a checkpoint between them."""
    for by_graph, wanted in zip(run_ranks(2, steps_of_every_kind, True), run_ranks(2, steps_of_every_kind, False)):
        assert by_graph["repeated in the graph"] == wanted["repeated in the graph"] >= 1
        assert by_graph["losses"] == wanted["losses"] and len(wanted["losses"]) == 39
        assert all(torch.equal(by_graph["weights"][name], value) for name, value in wanted["weights"].items())
        assert by_graph["captures"] >= 6 and wanted["captures"] == 0
