"""Megatron's shared expert next to calls that are only started: what runs between a start and its end, forward and
backward; equal results; and what an exception there leaves."""

from __future__ import annotations

import contextlib
import gc
import logging
import types
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.errors import GroupMismatchError
from megatron_ep_v2.megatron import managers, overlap
from tests.helpers import redundant_layer
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups, step
from tests.helpers.moe_features import SHARED, WHOLE_LAYER
from tests.helpers.one_memory import OneMemory, in_one_memory
from tests.helpers.shapes import CPU
from tests.helpers.shared_expert import shared_expert_on_the_cpu, with_overlap

OVERLAPPED = {**SHARED, "moe_shared_expert_overlap": True}
GATE = {"moe_shared_expert_gate": True}

WGRAD = "overlap_dispatch_backward_with_experts_wgrad"
with_wgrad = pytest.mark.skipif(
    not hasattr(TransformerConfig, WGRAD), reason="this Megatron-Core has no such option (0.19 has)"
)

FORWARD = ["dispatch starts", "shared fc1", "dispatch ends", "experts", "combine starts", "shared fc2", "combine ends"]
BACKWARD = [
    *("cached dispatch starts", "gradient of shared fc2", "cached dispatch ends"),
    *("combine starts", "gradient of fc", "gradient of fc", "gradient of shared fc1", "combine ends"),
]


def note(layer: Any, order: list[str]) -> None:
    """Note when the linears and the experts run, and when the gradients of their weights are there."""
    layer.experts.register_forward_hook(lambda *_: order.append("experts"))
    for number in (1, 2) if layer.shared_experts else ():
        shared = getattr(layer.shared_experts, f"linear_fc{number}")
        shared.register_forward_hook(lambda *_, number=number: order.append(f"shared fc{number}"))
        shared.weight.register_hook(lambda _, number=number: order.append(f"gradient of shared fc{number}"))
    if layer.shared_experts and layer.shared_experts.use_shared_expert_gate:
        layer.shared_experts.gate_weight.register_hook(lambda _: order.append("gradient of the gate"))
    for linear in (layer.experts.linear_fc1, layer.experts.linear_fc2):
        linear.weight.register_hook(lambda _: order.append("gradient of fc"))


def as_bytes(results: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: value.double().numpy().tobytes() for name, value in results.items()}


def overlapped(group: Any, micro_batches: int, more: dict[str, Any], layout: str = "expanded") -> dict[str, Any]:
    """Results with calls that are started, and with the waits in them; the order of the former, and of the latter's
    weight gradients; what is logged."""
    found: dict[str, Any] = {"said": []}
    handler = logging.Handler()
    handler.emit = lambda record: found["said"].append(record.getMessage())  # type: ignore[method-assign]
    overlap.say_overlap.cache_clear()  # an earlier job of this process may have said it
    overlap.logger.addHandler(handler)
    overlap.logger.setLevel(logging.INFO)
    with process_groups(), shared_expert_on_the_cpu(), in_one_memory() as order:
        hidden = hidden_states(CPU, CPU.tokens - 5 * group.rank(), 1)
        for name, defers in (("started", True), ("waiting", False)):
            with mock.patch.object(ReferenceBuffer, "defers", defers):
                layer = make_layer(CPU, "flex", layout, "grouped", **more)
                order.clear()
                note(layer, order)
                found[name] = as_bytes(step(layer, hidden, micro_batches))
                found[f"order, {name}"] = list(order)
    overlap.logger.removeHandler(handler)
    found["said"] = [text for text in found["said"] if "overlap" in text]
    return found


@with_overlap
def test_what_runs_between_the_start_of_a_call_and_its_end() -> None:
    for found in run_ranks(2, overlapped, 1, OVERLAPPED):
        assert found["started"] == found["waiting"] and found["started"]
        assert found["order, started"] == FORWARD + BACKWARD
        assert not any("start" in each for each in found["order, waiting"])
        launches, waits = found["said"]
        assert launches.endswith("launches the shared expert before it waits for the counts")
        assert waits.endswith("before it launches the shared expert, because this buffer cannot start a call")


@with_overlap
def test_the_communication_starts_before_the_gradient_of_the_gate() -> None:
    """No bits are compared: the gradient of x is a sum of three, in the order in which they are there."""
    for found in run_ranks(2, overlapped, 1, OVERLAPPED | GATE):
        order = found["order, started"]
        assert [each for each in order if "gate" not in each] == FORWARD + BACKWARD
        assert order.index("cached dispatch starts") < order.index("gradient of the gate")


@with_overlap
@pytest.mark.parametrize(
    "more",
    [
        {"moe_grouped_gemm": True, "recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
        {"moe_router_dtype": "fp64"},
    ],
)
def test_several_micro_batches_in_flight(more: dict[str, Any]) -> None:
    for found in run_ranks(2, overlapped, 2, OVERLAPPED | more):
        assert found["started"] == found["waiting"] and found["started"]
        assert found["order, started"] == 2 * FORWARD + 2 * BACKWARD


@with_overlap
def test_a_recomputed_layer_starts_nothing_and_says_so() -> None:
    for found in run_ranks(2, overlapped, 1, OVERLAPPED | WHOLE_LAYER):
        assert found["started"] == found["waiting"] and found["started"]
        assert not any("start" in each for each in found["order, started"])
        assert found["said"][0].endswith("the layer is recomputed")


@with_wgrad
def test_weight_gradients_next_to_the_backward_of_the_dispatch_without_a_shared_expert() -> None:
    with_te = "megatron.core.transformer.transformer_config.is_te_min_version"  # Megatron asks for it at this option
    for found in run_ranks(2, patched, with_te, {WGRAD: True}):
        assert found["started"] == found["waiting"] and found["started"]
        assert found["order, started"] == [
            *("dispatch starts", "dispatch ends", "experts"),
            *("combine starts", "gradient of fc", "gradient of fc", "combine ends"),
        ]
        started, before = found["said"]
        assert started.endswith("run next to the backward of one")
        assert before.endswith("run before the backward of a dispatch, because this buffer cannot start a call")


@with_overlap
@pytest.mark.parametrize(
    ("layout", "why"), [("compact", "the layout is compact"), ("sync-free", "the host does not wait in sync-free mode")]
)
def test_other_layouts_start_nothing_and_say_so(layout: str, why: str) -> None:
    for found in run_ranks(2, overlapped, 1, OVERLAPPED, layout):
        assert found["started"] == found["waiting"] and found["started"]
        assert not any("start" in each for each in found["order, started"])
        (said,) = found["said"]
        assert said.endswith(why) and said.count("the host") == 1


def patched(group: Any, name: str, more: dict[str, Any]) -> dict[str, Any]:
    with mock.patch(name, lambda *_: True):
        return overlapped(group, 1, more)


def with_redundant_experts(group: Any) -> dict[str, Any]:
    """Results with and without a start, the order of the former, and the transfers of experts in both."""
    found: dict[str, Any] = {}
    with process_groups(), shared_expert_on_the_cpu(), in_one_memory() as order:
        topk_idx = redundant_layer.routing("zipf", CPU, group.rank(), 40 - 3 * group.rank())
        x, grad = redundant_layer.inputs(CPU, len(topk_idx))
        for name, defers in (("started", True), ("waiting", False)):
            with mock.patch.object(ReferenceBuffer, "defers", defers), redundant_layer.watched() as seen:
                layer = redundant_layer.build(CPU, "grouped", topk_idx, 1, **OVERLAPPED)
                order.clear()
                note(layer, order)
                found[name] = as_bytes(redundant_layer.step(layer, x, grad))
            found[f"order, {name}"], found[f"transfers, {name}"] = list(order), (seen.calls, seen.mappings)
    return found


@with_overlap
def test_a_dispatch_with_redundant_experts_is_planned_and_then_started() -> None:
    for found in run_ranks(2, with_redundant_experts):
        assert found["started"] == found["waiting"] and found["started"]
        calls, _ = found["transfers, started"]
        assert found["transfers, started"] == found["transfers, waiting"] and "reduce_grads" in calls
        order = found["order, started"]
        assert order[: len(FORWARD)] == FORWARD
        assert [each for each in order[len(FORWARD) :] if each != "gradient of fc"] == [
            each for each in BACKWARD if each != "gradient of fc"
        ]


class Stop(RuntimeError):
    """What a test raises between start and end."""


@contextlib.contextmanager
def failing(layer: Any, where: str) -> Iterator[None]:
    """The shared expert raises `Stop` where it runs next to a call."""

    def fail(*_: Any) -> None:
        raise Stop(where)

    part, number = where.split(", fc")
    linear = getattr(layer.shared_experts, f"linear_fc{number}")
    hook = linear.register_forward_hook(fail) if part == "forward" else linear.weight.register_hook(fail)
    try:
        yield
    finally:
        hook.remove()
        layer.shared_experts._overlap_state = type(layer.shared_experts._overlap_state).IDLE  # of Megatron's own checks


@contextlib.contextmanager
def brought() -> Iterator[list[weakref.ref[Any]]]:
    """What goes into calls that are started in here and what they bring: tensors, handles, and the calls."""
    found: list[weakref.ref[Any]] = []
    theirs = OneMemory._bring

    def noting(self: Any, name: str, x: Any, answer: Any) -> Any:
        pending = theirs(self, name, x, answer)
        found.extend(weakref.ref(each) for each in (x, *answer, pending) if each is not None)
        return pending

    with mock.patch.object(OneMemory, "_bring", noting):
        yield found


def fail_in_between(group: Any, where: str) -> tuple[list[bool], list[str], list[str], int]:
    """Whether the layer's next steps are right; what was raised; the last call by then; and how much of what was in
    flight then is left after those steps."""
    with process_groups(), shared_expert_on_the_cpu(), in_one_memory() as order:
        hidden = hidden_states(CPU, CPU.tokens, 1)
        layer = make_layer(CPU, "flex", "expanded", "grouped", **OVERLAPPED)
        wanted, raised = as_bytes(step(layer, hidden)), []
        order.clear()
        with failing(layer, where), brought() as in_flight:
            try:
                step(layer, hidden)
            except RuntimeError as error:
                raised.append(str(error))
        assert len(in_flight) >= 4
        left, same = order[-1:], []
        for starts in (False, True):  # a call that waits must not take what the other one has left
            layer.token_dispatcher._comm_manager.starts = starts
            same.append(as_bytes(step(layer, hidden)) == wanted)
        gc.collect()
        return same, raised, left, sum(each() is not None for each in in_flight)


WHERE = {
    "forward, fc1": "dispatch starts",
    "forward, fc2": "combine starts",
    "backward, fc2": "cached dispatch starts",
    "backward, fc1": "combine starts",
}


@with_overlap
@pytest.mark.parametrize(("where", "left"), WHERE.items())
def test_an_exception_between_start_and_end_leaves_nothing(where: str, left: str) -> None:
    for same, raised, last, kept in run_ranks(2, fail_in_between, where):
        assert all(same) and raised == [where] and last == [left] and kept == 0


def fail_alone(group: Any, where: str) -> list[str]:
    """What becomes of two steps, until an error of the buffer, where rank 1 alone fails in the first one between start
    and end, and goes on."""
    with process_groups(), shared_expert_on_the_cpu(), in_one_memory():
        hidden = hidden_states(CPU, CPU.tokens, 1)
        layer = make_layer(CPU, "flex", "expanded", "grouped", **OVERLAPPED)
        wanted, said = as_bytes(step(layer, hidden)), []
        for fails in (group.rank() == 1, False):
            try:
                with failing(layer, where) if fails else contextlib.nullcontext():
                    said.append("right" if as_bytes(step(layer, hidden)) == wanted else "wrong")
            except Stop:
                said.append("stopped")
            except GroupMismatchError as error:
                return [*said, str(error)]
        return said


@with_overlap
@pytest.mark.parametrize("where", WHERE)
def test_a_rank_that_fails_alone_and_goes_on_is_named(where: str) -> None:
    """After the last call of a backward was started, no rank waits for it any more."""
    mine, its = run_ranks(2, fail_alone, where)
    if where == "backward, fc1":
        assert (mine, its) == (["right", "right"], ["stopped", "right"])
        return
    (text,), (first, other_text) = mine, its
    assert first == "stopped"
    for said in (text, other_text):
        assert "disagree about" in said and "call: rank 1 has dispatch; the others have" in said


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"moe_shared_expert_overlap": True}, "moe_shared_expert_overlap"),
        ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm"),
        ({"overlap_dispatch_backward_with_experts_wgrad": True}, "overlap_dispatch_backward_with_experts_wgrad"),
        (
            {"moe_shared_expert_overlap": True, "overlap_dispatch_backward_with_experts_wgrad": True},
            "moe_shared_expert_overlap",
        ),
    ],
)
def test_when_megatron_has_something_to_run_in_between(fields: dict[str, bool], expected: str | None) -> None:
    names = ("moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm")
    config = types.SimpleNamespace(**dict.fromkeys(names, False) | fields)
    manager: Any = types.SimpleNamespace(config=config, starts=True)
    assert managers.ExpandedManager._overlap(manager) == expected
    manager.starts = False
    assert managers.ExpandedManager._overlap(manager) is None
