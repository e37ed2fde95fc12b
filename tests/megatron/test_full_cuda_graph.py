"""Megatron's CUDA graph of a whole forward and backward in sync-free mode, on a stand-in for CUDA: what overflows in a
replay runs again eagerly, and other shapes are captured again or refused."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import full_cuda_graph as theirs
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules

import megatron_ep_v2
from megatron_ep_v2 import device_checks, graphs, sync_free
from megatron_ep_v2.errors import InputError, SettingsError
from megatron_ep_v2.megatron import full_cuda_graph as ours
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups
from tests.helpers.megatron_training import Job, Setup, on_cpu
from tests.helpers.reports import Report, assert_report, attempt
from tests.helpers.shapes import CPU, Split
from tests.megatron.test_forward_backward import BIAS, SYNC_FREE, Batches, Skewed, assert_equal, room_for


class Graph:
    """Stands for a CUDA graph of a schedule: a replay calls Megatron's schedule, without what this package binds, on
    the memory and with the room of the capture."""

    def __init__(self) -> None:
        self.replay: Callable[[], None] = lambda: None

    def register_generator_state(self, state: Any) -> None: ...

    def capture(self, schedule: Callable[..., Any], call: dict[str, Any], events: list[str]) -> list[Any]:
        items = [list(source) for source in call["data_iterator"]]
        rooms = {room: room.num_selections for room in sync_free._rooms.values()}
        results: list[Any] = []

        def replay() -> None:
            events.append("replay")
            now = {room: room.num_selections for room in rooms}
            for room in rooms:
                room.num_selections = rooms[room]
            results[:] = schedule(**{**call, "data_iterator": list(map(iter, items))})
            for room in rooms:
                room.num_selections = now[room]

        self.replay = replay
        return results


@contextlib.contextmanager
def fake_cuda() -> Iterator[list[str]]:
    """CUDA as far as Megatron's wrapper asks for it, and its schedule recorded. Yields what happened: eager, capture,
    replay."""
    capturing: list[Graph] = []
    events: list[str] = []
    schedule = schedules.forward_backward_no_pipelining

    @contextlib.contextmanager
    def graph(graph: Graph, **_: Any) -> Iterator[None]:
        capturing.append(graph)
        with mock.patch.object(device_checks, "read_all", side_effect=AssertionError("a read in a capture")):
            yield
        capturing.pop()

    @functools.wraps(schedule)
    def recorded(**call: Any) -> Any:
        events.append("capture" if capturing else "eager")
        return capturing[0].capture(schedule, call, events) if capturing else schedule(**call)

    wrapper, loader = theirs.FullCudaGraphWrapper, theirs.StaticBufferLoader
    stages = ("training", "validation")
    with (
        mock.patch.multiple(torch.cuda, CUDAGraph=Graph, graph=graph, is_available=lambda: bool(capturing)),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing)),
        mock.patch.object(torch.autograd.graph, "set_override_stale_capture_stream", lambda on: None, create=True),
        mock.patch.multiple(theirs, get_all_rng_states=dict),
        mock.patch.object(theirs, "get_graph_pool", lambda single: None, create=True),
        mock.patch.object(schedules, "forward_backward_no_pipelining", recorded),
        mock.patch.object(loader, "static_buffers", {stage: [] for stage in stages}),
        mock.patch.object(wrapper, "curr_iteration", dict.fromkeys(stages, 0)),
        mock.patch.object(wrapper, "cuda_graph", dict.fromkeys(stages)),
        mock.patch.object(wrapper, "result", dict.fromkeys(stages)),
        mock.patch.object(ours, "_sizes", {}),
    ):
        yield events


class Training:
    """A job that is given micro-batches one step at a time. On ranks 2 and 3 their rows have no room when skewed."""

    def __init__(self, world: Any, graphed: bool):
        self.job = Job(Setup(experts="grouped", overlap=True, more=BIAS))
        self.batches, self.skewed = Batches(), Skewed(self.job, world)
        schedule = get_forward_backward_func()
        self.run = theirs.FullCudaGraphWrapper(schedule, cuda_graph_warmup_steps=2) if graphed else schedule

    def step(self, micro_batches: int = 2, skewed: bool = False, size: int = 2) -> list[float]:
        self.skewed.on = skewed
        items = [next(self.batches) for _ in range(micro_batches)]
        items[-1]["tokens"] = items[-1]["tokens"][:size]
        return self.job.scheduled_step(iter(items), micro_batches, self.run)[0]


STEPS = [False, False, False, False, True, False, False, True]  # skewed or not


def replay(world: Any, graphed: bool) -> dict[str, Any]:
    """Losses and weights after STEPS, and what happened in each step."""
    with (
        room_for(190 if graphed and world.rank() > 1 else 0),
        on_cpu(),
        fake_cuda() as events,
        process_groups(Split(1, 2)),
    ):
        training = Training(world, graphed)
        losses, happened, rooms = [], [], []
        for skewed in STEPS:
            losses.append(training.step(skewed=skewed))
            rooms.append(next(iter(sync_free._rooms.values())).num_selections)
            happened.append(" ".join(events))
            events.clear()
        buffers = dict(training.job.model.named_buffers())
        result = {"losses": losses, "weights": training.job.weights(), "buffers": buffers}
        return {"result": result, "happened": happened, "rooms": rooms}


@pytest.mark.slow
def test_an_overflow_in_a_replay_runs_again_eagerly() -> None:
    wanted = run_ranks(4, replay, False, env=SYNC_FREE)
    assert all(found["happened"] == ["eager"] * 8 for found in wanted)
    for rank, (found, eager) in enumerate(zip(run_ranks(4, replay, True, env=SYNC_FREE), wanted, strict=True)):
        assert found["happened"] == [
            *["eager", "eager", "capture replay", "replay"],
            *["replay eager", "eager", "capture replay", "replay"],  # which now has room for the skewed step
        ]
        rooms = found["rooms"]
        if rank < 2:
            assert set(rooms) == set(eager["rooms"]), "all that could arrive has room, and keeps it"
        else:
            assert rooms[2] == rooms[3] < rooms[1] < rooms[4], "the capture has what the steps before it needed"
        assert_equal(found["result"], eager["result"])


def change_sizes(world: Any) -> tuple[list[str], list[list[float]], Report | None, bool, list[float]]:
    """What happens with one, two and then three micro-batches, losses; what a smaller micro-batch on rank 3 says,
    whether it changed a weight, and the losses of the step after it."""
    with on_cpu(), fake_cuda() as events, process_groups(Split(1, 2)):
        training = Training(world, True)
        happened, losses = [], []
        for micro_batches in (1, 2, 2, 2, 3, 3, 3, 3):
            losses.append(training.step(micro_batches))
            happened.append(" ".join(events))
            events.clear()
        before = training.job.weights()
        said = attempt(lambda: training.step(3, size=1 if world.rank() == 3 else 2) and None)
        untouched = all(torch.equal(value, before[name]) for name, value in training.job.weights().items())
        return happened, losses, said, untouched, training.step(3)


@pytest.mark.slow
def test_other_sizes_are_captured_again_or_refused_on_every_rank() -> None:
    for rank, (happened, losses, said, untouched, after) in enumerate(run_ranks(4, change_sizes, env=SYNC_FREE)):
        again = ["eager", "eager", "capture replay"]
        assert happened == ["eager", *again, *again, "replay"]
        assert [len(of_step) for of_step in losses] == [1, 2, 2, 2, 3, 3, 3, 3]
        assert untouched and len(after) == 3
        if rank < 2:
            assert said is not None and said.kind == "PeerError"
        else:
            found = "{'tokens': [1, 13]} after {'tokens': [2, 13]}" if rank == 3 else "on another rank"
            assert_report(said, InputError, "another shape", f"found: {found}", "[1]")


def test_the_check_of_a_step_that_was_given_up_goes_with_it() -> None:
    """Without Python's collection, which ranks do at different times: a later read would wait for other ranks."""
    gc.disable()
    try:
        with mock.patch.object(ours.parallel_state, "get_expert_tensor_and_model_parallel_group", lambda: None):
            shapes = ours._Shapes("training", torch.device("cpu"))
        next(shapes.checked(iter([{"tokens": torch.ones(2)}])))
        check = weakref.ref(shapes._check)
        assert check() is not None
        del shapes
        assert check() is None
    finally:
        gc.enable()


def evaluate(world: Any, graphed: bool) -> tuple[list[float], list[str]]:
    """Losses of four evaluations, and what happened; rank 3 is said to overflow in the last replay."""
    with on_cpu(), fake_cuda() as events, process_groups(Split(1, 2)):
        training = Training(world, graphed)
        losses = []
        for n in range(4):
            if graphed and n == 3:
                recorded = theirs.FullCudaGraphWrapper.cuda_graph["validation"]
                recorded.replay = overflowing(recorded.replay, world.rank())
            with torch.no_grad():
                found = training.run(
                    forward_step_func=training.job.forward_step,
                    data_iterator=iter([next(training.batches)]),
                    model=[training.job.ddp],
                    num_microbatches=1,
                    seq_length=12,
                    micro_batch_size=2,
                    forward_only=True,
                )
            losses.append(float(found[0]["loss"]))
        return losses, events


def overflowing(replay: Callable[[], None], rank: int) -> Callable[[], None]:
    def run() -> None:
        replay()
        if rank > 1:
            next(iter(sync_free._rooms.values())).checks[False].add(torch.tensor([rank == 3]))

    return run


@pytest.mark.slow
def test_an_evaluation_that_overflows_in_a_replay_runs_again_eagerly() -> None:
    wanted = run_ranks(4, evaluate, False, env=SYNC_FREE)
    for (losses, happened), (eager, _) in zip(run_ranks(4, evaluate, True, env=SYNC_FREE), wanted, strict=True):
        assert happened == ["eager", "eager", "capture", "replay", "replay", "eager"]
        assert losses == eager


def destroy_buffers(world: Any, graphed: bool) -> tuple[list[str], list[list[float]], bool]:
    """What happens in nine steps, after two and after six of which the buffers are destroyed, their losses, and whether
    the graph that had been captured is gone."""
    with on_cpu(), fake_cuda() as events, process_groups(Split(1, 2)):
        training = Training(world, graphed)
        graphs.forget_keepers()  # as in a rank that was forked after `install()`
        happened, losses, gone = [], [], True
        for number in range(9):
            losses.append(training.step())
            happened.append(" ".join(events))
            events.clear()
            if number in (1, 5):
                captured = theirs.FullCudaGraphWrapper.cuda_graph["training"]
                assert (captured is not None) == (graphed and number == 5)
                alive = weakref.ref(captured) if captured is not None else lambda: None
                del captured
                megatron_ep_v2.destroy_buffers()
                gone = alive() is None
        return happened, losses, gone


@pytest.mark.slow
def test_a_graph_goes_with_the_buffers_that_it_uses() -> None:
    """A step that finds none builds them, which cannot be captured, also where the warm-up steps were done."""
    wanted = run_ranks(4, destroy_buffers, False, env=SYNC_FREE)
    found = run_ranks(4, destroy_buffers, True, env=SYNC_FREE)
    warm_up, capture = ["eager", "eager"], "capture replay"
    for (happened, losses, gone), (_, eager, _) in zip(found, wanted, strict=True):
        assert happened == [*warm_up, *warm_up, capture, "replay", *warm_up, capture]
        assert losses == eager and gone


def refused(group: Any) -> dict[str, Report | None]:
    """Layout -> what a layer says that is captured."""
    found = {}
    with process_groups():
        for layout in ("compact", "expanded"):
            layer = make_layer(CPU, "flex", layout, "grouped")
            with mock.patch.multiple(torch.cuda, is_initialized=lambda: True, is_current_stream_capturing=lambda: True):
                found[layout] = attempt(functools.partial(layer, hidden_states(CPU, 4, 1)))
            megatron_ep_v2.destroy_buffers()
    return found


def test_a_layer_that_waits_is_not_captured() -> None:
    for found in run_ranks(2, refused):
        for layout, said in found.items():
            assert_report(said, SettingsError, f"layout={layout}", "MCORE_DEEPEP_V2_SYNC_FREE=1")
