"""Calls that are started before their rows are asked for: the same rows and gradients, forward and backward, whatever
is called before the wait; and which streams wait."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.growing import GrowingBuffer
from megatron_ep_v2.buffers.pending import Pending, Starter
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.recompute import Replayed
from megatron_ep_v2.started_a2a import finish_combine, finish_dispatch, start_combine, start_dispatch
from tests.helpers.cases import SMALL, make_batch
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.one_memory import Finishing, OneMemory, in_one_memory

# Which of the two is started, and whether the dispatch's backward begins with the rows' gradients.
WAYS: dict[str, dict[str, bool]] = {
    "dispatch": {"dispatch": True},
    "dispatch, its backward as a whole": {"dispatch": True, "next_to_experts": False},
    "combine": {"combine": True},
    "both": {"dispatch": True, "combine": True},
}


def layer(
    group: Any,
    seed: int,
    dispatch: bool = False,
    combine: bool = False,
    next_to_experts: bool = True,
    alignment: int = 1,
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    """Dispatch, a factor for each row, combine: what comes out, and all gradients."""
    batch = make_batch(SMALL, group.rank(), turn=seed)
    weights = batch.topk_weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    x, probs = batch.x.to(dtype).requires_grad_(), weights.requires_grad_()
    given = (x, batch.topk_idx, probs, SMALL.experts, group)
    if dispatch:
        started = start_dispatch(*given, expert_alignment=alignment, next_to_experts=next_to_experts)
        assert started is not None
        rows, row_probs, counts, handle = finish_dispatch(started)
    else:
        rows, _, row_probs, counts, handle = fused_dispatch(*given, do_expand=True, expert_alignment=alignment)
    products = rows * row_probs[:, None].to(rows)
    if combine:
        combining = start_combine(products, group, handle)
        assert combining is not None
        y = finish_combine(combining)
    else:
        y, _ = fused_combine(products, group, handle)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    assert x.grad is not None and probs.grad is not None
    return {"y": y.detach(), "x": x.grad, "probs": probs.grad, "counts": counts}


@isolated
def started_and_not(group: Any, alignment: int, deterministic: bool, fp8: bool) -> list[str]:
    """What differs, bit by bit, by way. With results that are not there before the wait."""
    chosen = {"buffer": "reference", "num_max_tokens_per_rank": 64, "reference_strict": False}
    wire = {"dispatch_dtype": "fp8", "grad_dispatch_dtype": "fp8"} if fp8 else {}
    settings.activate(settings.resolve(**chosen, deterministic=deterministic, **wire))
    run = functools.partial(layer, group, 0, alignment=alignment, dtype=torch.bfloat16 if fp8 else torch.float64)
    with in_one_memory():
        theirs = run()
    return [f"{way}: {name}" for way in WAYS for name, ours in run(**WAYS[way]).items() if not ours.equal(theirs[name])]


@pytest.mark.parametrize(
    ("alignment", "deterministic", "fp8"), [(1, False, False), (16, False, False), (16, True, False), (1, False, True)]
)
def test_the_rows_and_gradients_are_the_same(alignment: int, deterministic: bool, fp8: bool) -> None:
    assert run_ranks(2, started_and_not, alignment, deterministic, fp8) == [[], []]


# --------------------------------------------------------------------------------------- other calls before the wait


def use_one_memory(group: Any, kind: type[OneMemory], watched: bool, growing: bool) -> None:
    """Put this group's buffer on it."""
    chosen = {"buffer": "reference", "reference_strict": False, "watchdog_secs": 60 if watched else 0}
    settings.activate(settings.resolve(**chosen, **({} if growing else {"num_max_tokens_per_rank": 64})))
    with in_one_memory(kind):
        layer(group, 0)
    found = pool.find(group)
    kinds = [type(found)]
    while not isinstance(found, ReferenceBuffer):
        found = found.buffer
        kinds.append(type(found))
    assert kinds[-1] is kind
    assert (GrowingBuffer in kinds) is growing and (len(kinds) > 1 + growing) is watched


def at_once(start: Callable[[], Pending[Any]]) -> None:
    start().wait()


@isolated
def calls_in_between(group: Any, kind: type[OneMemory], watched: bool, growing: bool) -> dict[str, bool]:
    """Whether what a started call brings arrives, by the call and what is called before its wait."""
    use_one_memory(group, kind, watched, growing)
    one, other = (make_batch(SMALL, group.rank(), turn=turn) for turn in (1, 2))
    given = (one.x.double(), one.topk_idx, one.topk_weights.double(), SMALL.experts, group)
    again = (other.x.double(), other.topk_idx, other.topk_weights.double(), SMALL.experts, group)
    buffer: Any = pool.find(group)
    rows, _, _, _, handle = fused_dispatch(*again, do_expand=True)
    repeat = {"handle": handle, "do_expand": True}
    started: dict[str, Callable[[], Pending[Any]]] = {
        "dispatch": lambda: buffer.start_dispatch(
            given[0], topk_idx=given[1], topk_weights=given[2], num_experts=SMALL.experts, do_expand=True
        ),
        "cached dispatch": lambda: buffer.start_dispatch(again[0], **repeat),
        "combine": lambda: buffer.start_combine(rows, handle),
    }
    calls: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "dispatch": lambda: fused_dispatch(*again, do_expand=True),
        "combine": lambda: fused_combine(rows, group, handle),
        "cached dispatch": lambda: buffer.dispatch(again[0], **repeat),
        **{f"started {name}": functools.partial(at_once, start) for name, start in started.items()},
    }
    found = {}
    for name, start in started.items():
        wanted = start().wait()[0].clone()
        for between, call in calls.items():
            pending = start()
            call()
            found[f"{name}, {between}"] = torch.equal(pending.wait()[0], wanted)
    return found


@pytest.mark.parametrize(
    ("kind", "watched", "growing"),
    [(Finishing, False, False), (OneMemory, True, False), (OneMemory, False, True), (Finishing, True, True)],
)
def test_another_call_finishes_it_first(kind: type[OneMemory], watched: bool, growing: bool) -> None:
    for found in run_ranks(2, calls_in_between, kind, watched, growing):
        assert found == dict.fromkeys(found, True) and len(found) == 21


def test_without_anyone_who_finishes_it_the_rows_would_be_gone() -> None:
    """The control: the bare buffer."""
    for found in run_ranks(2, calls_in_between, OneMemory, False, False):
        assert {name for name, there in found.items() if there} == {name for name in found if "nothing" in name}


def test_a_failure_reaches_every_wait() -> None:
    def fail() -> None:
        raise ConnectionError("lost")

    pending = Pending(fail)
    for call in (pending.finish, pending.wait, pending.wait):
        with pytest.raises(ConnectionError, match="lost"):
            call()


class Queue:
    """A stream that notes what it waits for."""

    current: Any = None

    def __init__(self) -> None:
        self.waits: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waits.append(event.stream)


class Mark:
    """An event that knows its stream."""

    def record(self, stream: Queue) -> None:
        self.stream = stream


class OnGpu(torch.Tensor):
    """A result that notes the streams which are recorded for its memory."""

    is_cuda = True
    recorded: list[Queue]

    def __new__(cls) -> OnGpu:
        made = torch.empty(0).as_subclass(cls)
        made.recorded = []
        return made

    def record_stream(self, stream: Any) -> None:
        self.recorded.append(stream)


class Calls(Starter):
    """A buffer that does nothing."""

    def call(self) -> None:
        self._finish_started()


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> tuple[Queue, Queue, Queue]:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Queue.current)
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    return Queue(), Queue(), Queue()


def test_on_one_stream_nothing_waits(queues: tuple[Queue, ...]) -> None:
    Queue.current, buffer, result = queues[0], Calls(), OnGpu()
    assert buffer._start(lambda: result).wait() is result
    buffer.call()
    assert queues[0].waits == [] and result.recorded == []


def test_who_takes_the_result_waits_for_the_stream_that_has_finished_the_call(queues: tuple[Queue, ...]) -> None:
    start, end, take = queues
    Queue.current, buffer, result = start, Calls(), OnGpu()
    pending = buffer._start(lambda: result)
    Queue.current = end
    buffer.call()
    Queue.current = take
    pending.wait()
    assert take.waits == [end] and start.waits == [] and end.waits == []
    assert result.recorded == [start, take]


def test_the_next_call_waits_for_the_stream_that_has_finished_the_one_before(queues: tuple[Queue, ...]) -> None:
    """Else it would write over rows that are still copied."""
    start, end, after = queues
    Queue.current, buffer = start, Calls()
    pending = buffer._start(OnGpu)
    Queue.current = end
    pending.wait()
    Queue.current = after
    buffer.call()
    buffer.call()
    assert after.waits == [end] and end.waits == []


# ---------------------------------------------------------------------------------------------------- where none starts


@isolated
def not_started(group: Any) -> list[bool]:
    """In a checkpoint's two runs; with a buffer that has no such call."""
    settings.activate(settings.resolve(buffer="reference", num_max_tokens_per_rank=64, reference_strict=False))
    batch, found = make_batch(SMALL, group.rank()), []

    def forward(x: torch.Tensor) -> torch.Tensor:
        given = (x, batch.topk_idx, batch.topk_weights.double(), SMALL.experts, group)
        found.append(start_dispatch(*given) is None)
        rows, _, _, _, handle = fused_dispatch(*given, do_expand=True)  # the second run ends here
        found.append(start_combine(rows, group, handle) is None)
        return fused_combine(rows, group, handle)[0]

    x = batch.x.double().requires_grad_()
    checkpoint(Replayed(forward), x, use_reentrant=False).sum().backward()
    with mock.patch.object(ReferenceBuffer, "defers", False):
        forward(x)
    return found


def test_where_none_is_started() -> None:
    assert run_ranks(2, not_started) == [[True] * 5] * 2


@isolated
def refused(group: Any) -> str:
    """What a second backward says."""
    settings.activate(settings.resolve(buffer="reference", num_max_tokens_per_rank=64, reference_strict=False))
    batch = make_batch(SMALL, group.rank())

    def forward(x: torch.Tensor) -> torch.Tensor:
        started = start_dispatch(x, batch.topk_idx, batch.topk_weights.double(), SMALL.experts, group)
        assert started is not None
        rows, probs, _, handle = finish_dispatch(started)
        combining = start_combine(rows * probs[:, None], group, handle)
        assert combining is not None
        return finish_combine(combining)

    x = batch.x.double().requires_grad_()
    y = forward(x)
    y.sum().backward(retain_graph=True)
    try:
        y.sum().backward()
    except EPError as error:
        return error.what
    return ""


def test_a_second_backward_is_refused() -> None:
    for said in run_ranks(2, refused):
        assert "a second time" in said
