"""Dispatches that are started before their rows are asked for: the same rows and gradients, also in Megatron's layer,
with the shared expert in between; whatever is called before the wait; and after an exception there."""

from __future__ import annotations

import contextlib
import gc
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.growing import GrowingBuffer
from megatron_ep_v2.buffers.pending import Pending
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.fused_a2a import finish_dispatch, fused_combine, fused_dispatch, start_dispatch
from megatron_ep_v2.megatron import managers
from megatron_ep_v2.recompute import Replayed
from tests.helpers.cases import SMALL, make_batch
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups, step
from tests.helpers.moe_features import SHARED
from tests.helpers.shapes import CPU

NAN = float("nan")


def layer(group: Any, seed: int, started: bool, alignment: int = 1) -> dict[str, torch.Tensor]:
    """Dispatch, a factor for each row, combine: what comes out, and all gradients."""
    batch = make_batch(SMALL, group.rank(), turn=seed)
    x, probs = batch.x.double().requires_grad_(), batch.topk_weights.double().requires_grad_()
    given = (x, batch.topk_idx, probs, SMALL.experts, group)
    if started:
        pending = start_dispatch(*given, expert_alignment=alignment)
        assert pending is not None
        rows, row_probs, counts, handle = finish_dispatch(pending)
    else:
        rows, _, row_probs, counts, handle = fused_dispatch(*given, do_expand=True, expert_alignment=alignment)
    y, _ = fused_combine(rows * row_probs[:, None].to(rows), group, handle)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return {"y": y.detach(), "x": x.grad, "probs": probs.grad, "counts": counts}


@isolated
def started_and_not(group: Any, alignment: int, deterministic: bool) -> list[str]:
    """What differs, bit by bit."""
    chosen = {"buffer": "reference", "num_max_tokens_per_rank": 64, "reference_strict": False}
    settings.activate(settings.resolve(**chosen, deterministic=deterministic))
    ours, theirs = layer(group, 0, True, alignment), layer(group, 0, False, alignment)
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("alignment", [1, 16])
def test_the_rows_and_gradients_are_the_same(alignment: int, deterministic: bool) -> None:
    assert run_ranks(2, started_and_not, alignment, deterministic) == [[], []]


# --------------------------------------------------------------------------------------- other calls before the wait


class OneMemory(ReferenceBuffer):
    """Keeps the rows of a started dispatch where the next call writes, as DeepEP does: they are gone if it was not
    finished before."""

    def start_dispatch(self, x: Any, **arguments: Any) -> Pending[Any]:
        rows, *rest = self.dispatch(x, **arguments)
        vars(self).setdefault("landed", []).append(rows)

        def finish() -> Any:
            self.landed = [other for other in self.landed if other is not rows]
            return rows, *rest

        return Pending(finish)

    def _overwrite(self) -> None:
        for rows in vars(self).get("landed", []):
            rows.fill_(NAN)

    def dispatch(self, *args: Any, **arguments: Any) -> Any:
        self._overwrite()
        return super().dispatch(*args, **arguments)

    def combine(self, *args: Any, **arguments: Any) -> Any:
        self._overwrite()
        return super().combine(*args, **arguments)


def in_one_memory(group: Any, watched: bool, growing: bool) -> None:
    """Put this group's buffer on it."""
    chosen = {"buffer": "reference", "reference_strict": False, "watchdog_secs": 60 if watched else 0}
    settings.activate(settings.resolve(**chosen, **({} if growing else {"num_max_tokens_per_rank": 64})))
    with (
        mock.patch.object(pool, "ReferenceBuffer", OneMemory, create=True),
        mock.patch("megatron_ep_v2.buffers.reference.ReferenceBuffer", OneMemory),
    ):
        layer(group, 0, False)
    found = pool.find(group)
    kinds = [type(found)]
    while not isinstance(found, ReferenceBuffer):
        found = found.buffer
        kinds.append(type(found))
    assert kinds[-1] is OneMemory
    assert (GrowingBuffer in kinds) is growing and (len(kinds) > 1 + growing) is watched


@isolated
def calls_in_between(group: Any, watched: bool, growing: bool) -> dict[str, bool]:
    """Whether the rows of a started dispatch arrive, by the call before its wait."""
    in_one_memory(group, watched, growing)
    one, other = (make_batch(SMALL, group.rank(), turn=turn) for turn in (1, 2))
    given = (one.x.double(), one.topk_idx, one.topk_weights.double(), SMALL.experts, group)
    wanted = fused_dispatch(*given, do_expand=True)[0]
    again = (other.x.double(), other.topk_idx, other.topk_weights.double(), SMALL.experts, group)
    rows, _, _, _, handle = fused_dispatch(*again, do_expand=True)
    calls = {
        "nothing": lambda: None,
        "dispatch": lambda: fused_dispatch(*again, do_expand=True),
        "combine": lambda: fused_combine(rows, group, handle),
        "cached dispatch": lambda: pool.find(group).dispatch(again[0], handle=handle, do_expand=True),
        "another started one": lambda: finish_dispatch(start_dispatch(*again)),
    }
    found = {}
    for name, call in calls.items():
        started = start_dispatch(*given)
        call()
        found[name] = torch.equal(finish_dispatch(started)[0], wanted)
    return found


@pytest.mark.parametrize(("watched", "growing"), [(True, False), (False, True), (True, True)])
def test_another_call_finishes_it_first(watched: bool, growing: bool) -> None:
    for found in run_ranks(2, calls_in_between, watched, growing):
        assert found == dict.fromkeys(found, True)


def test_without_anyone_who_finishes_it_the_rows_would_be_gone() -> None:
    """The control: the bare buffer."""
    for found in run_ranks(2, calls_in_between, False, False):
        assert found.pop("nothing") and not any(found.values())


def test_a_failure_reaches_every_wait() -> None:
    def fail() -> None:
        raise ConnectionError("lost")

    pending = Pending(fail)
    for call in (pending.finish, pending.wait, pending.wait):
        with pytest.raises(ConnectionError, match="lost"):
            call()


# ---------------------------------------------------------------------------------------------- under Megatron's layer


class NoStream:
    """The CPU's one stream is in order by itself."""

    def __init__(self, *_: Any):
        self.wait_stream = lambda *_: None


@contextlib.contextmanager
def shared_expert_on_the_cpu() -> Iterator[None]:
    """What Megatron's shared expert next to communication needs of CUDA."""
    names = {"Stream": NoStream, "current_stream": NoStream, "stream": lambda *_: contextlib.nullcontext()}
    with mock.patch.multiple(torch.cuda, **names):
        yield


OVERLAPPED = {**SHARED, "moe_shared_expert_overlap": True}
with_overlap = pytest.mark.skipif(
    "alltoall or flex token dispatcher" not in inspect.getsource(TransformerConfig),
    reason="this Megatron-Core has no shared expert next to the flex dispatcher (0.19 has)",
)


def shared_layer(group: Any) -> dict[str, Any]:
    """With the dispatch started, and with the wait in it; what ran before the wait."""
    found: dict[str, Any] = {}
    with process_groups(), shared_expert_on_the_cpu():
        hidden = hidden_states(CPU, CPU.tokens - 5 * group.rank(), 1)
        for name, defers in (("started", True), ("waiting", False)):
            with mock.patch.object(ReferenceBuffer, "defers", defers):
                layer = make_layer(CPU, "flex", "expanded", "grouped", **OVERLAPPED)
                order: list[str] = []
                watch(layer, order)
                results = step(layer, hidden, 2)
                found[name] = {name: value.double().numpy().tobytes() for name, value in results.items()}
                found[f"order, {name}"] = order[: len(order) // 2]
    return found


def watch(layer: Any, order: list[str]) -> None:
    """Note when the dispatch starts, when its rows are asked for, when the shared expert and the experts run."""
    layer.shared_experts.linear_fc1.register_forward_hook(lambda *_: order.append("shared expert"))
    layer.experts.register_forward_hook(lambda *_: order.append("experts"))
    manager = layer.token_dispatcher._comm_manager
    for name, says in (("dispatch", "dispatch"), ("get_permuted_hidden_states_by_experts", "rows")):
        theirs = getattr(manager, name)

        def noted(*args: Any, theirs: Any = theirs, says: str = says, **named: Any) -> Any:
            answer = theirs(*args, **named)
            order.append(says if says == "rows" else f"{says}, {'there' if manager.handle else 'on its way'}")
            return answer

        setattr(manager, name, noted)


@with_overlap
def test_megatrons_shared_expert_runs_before_the_wait() -> None:
    for found in run_ranks(2, shared_layer):
        assert found["started"] == found["waiting"] and found["started"]
        assert found["order, started"] == ["dispatch, on its way", "shared expert", "rows", "experts"]
        assert found["order, waiting"] == ["dispatch, there", "shared expert", "rows", "experts"]


def fail_in_between(group: Any) -> tuple[bool, list[str], bool]:
    """Whether the layer's next step is right, what was raised, and whether the handle of the first one is gone."""
    with process_groups(), shared_expert_on_the_cpu():
        hidden = hidden_states(CPU, CPU.tokens, 1)
        layer = make_layer(CPU, "flex", "expanded", "grouped", **OVERLAPPED)
        wanted = step(layer, hidden)
        manager = layer.token_dispatcher._comm_manager
        raised = []

        def fail(*_: Any) -> None:
            raise RuntimeError("in the shared expert")

        hook = layer.shared_experts.linear_fc1.register_forward_hook(fail)
        try:
            layer(hidden)
        except RuntimeError as error:
            raised.append(str(error))
        hook.remove()
        started = weakref.ref(manager._started.pending)
        layer.shared_experts._overlap_state = type(layer.shared_experts._overlap_state).IDLE
        found = step(layer, hidden)
        gc.collect()
        same = all(torch.equal(found[name], wanted[name]) for name in wanted)
        return same, raised, started() is None


@with_overlap
def test_an_exception_before_the_wait_leaves_nothing() -> None:
    for same, raised, gone in run_ranks(2, fail_in_between):
        assert same and raised == ["in the shared expert"] and gone


@isolated
def not_started(group: Any) -> list[bool]:
    """In a checkpoint's two runs; with a buffer that has no such call."""
    settings.activate(settings.resolve(buffer="reference", num_max_tokens_per_rank=64, reference_strict=False))
    batch, found = make_batch(SMALL, group.rank()), []

    def forward(x: torch.Tensor) -> torch.Tensor:
        given = (x, batch.topk_idx, batch.topk_weights.double(), SMALL.experts, group)
        found.append(start_dispatch(*given) is None)
        rows, _, _, _, handle = fused_dispatch(*given, do_expand=True)
        return fused_combine(rows, group, handle)[0]

    x = batch.x.double().requires_grad_()
    checkpoint(Replayed(forward), x, use_reentrant=False).sum().backward()
    with mock.patch.object(ReferenceBuffer, "defers", False):
        forward(x)
    return found


def test_where_none_is_started() -> None:
    assert run_ranks(2, not_started) == [[True, True, True]] * 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"moe_shared_expert_overlap": True}, True),
        ({"moe_shared_expert_overlap": True, "overlap_moe_expert_parallel_comm": True}, False),
        ({"moe_shared_expert_overlap": True, "overlap_dispatch_backward_with_experts_wgrad": True}, False),
    ],
)
def test_when_megatron_has_something_to_run_before_the_wait(fields: dict[str, bool], expected: bool) -> None:
    names = ("moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm")
    config = types.SimpleNamespace(**dict.fromkeys(names, False) | fields)
    manager = types.SimpleNamespace(config=config)
    assert managers.ExpandedManager._may_start(manager) is expected  # type: ignore[arg-type]
