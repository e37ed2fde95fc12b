"""Activation recompute: one layout for each layer and micro-batch, the same gradients, and no handle is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from torch.utils.checkpoint import checkpoint

import megatron_ep_v2
from megatron_ep_v2 import device_checks, recompute
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.recompute import Replayed
from tests.helpers.cases import COMPACT, EXPANDED, PADDED, SMALL, Layout, make_batch
from tests.helpers.fused_layer import all_experts, grad_output, moe_layer, own_experts
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups, step
from tests.helpers.moe_features import WHOLE_LAYER
from tests.helpers.recorded_dispatches import alive, recorded
from tests.helpers.shapes import CPU

# --------------------------------------------------------------------------------- Megatron's layer, its own checkpoint


def compare_layers(group: Any, layout: str, micro_batches: int) -> dict[str, Any]:
    """Gradients of the real layer with and without recompute: the largest difference, and the dispatches of each."""
    found: dict[str, Any] = {}
    with process_groups():
        hidden = hidden_states(CPU, CPU.tokens, 1)
        plain = step(make_layer(CPU, "flex", layout), hidden, micro_batches)
        layer = make_layer(CPU, "flex", layout, **WHOLE_LAYER)
        with recorded() as (calls, handles):
            again = step(layer, hidden, micro_batches)
            found["calls"], found["alive"] = list(calls), alive(handles)
            found["load"] = [int(load.sum()) for load in megatron_ep_v2.expert_load()][-1]
            calls.clear()
            layer.eval()
            with torch.no_grad():
                layer(hidden)
            found["eval"], found["alive after eval"] = list(calls), alive(handles)
        assert plain.keys() == again.keys()
        found["difference"] = max((plain[name] - again[name]).abs().max().item() for name in plain)
        found["size"] = min(plain[name].abs().max().item() for name in plain)
    return found


def without_reuse(group: Any) -> list[str]:
    """The dispatches of a recomputed layer where the user has turned the reuse off."""
    with process_groups():
        layer = make_layer(CPU, "flex", **WHOLE_LAYER)
        megatron_ep_v2.install(buffer=CPU.buffer, num_max_tokens_per_rank=CPU.tokens, reuse_recompute_handle=False)
        with recorded() as (calls, _):
            step(layer, hidden_states(CPU, CPU.tokens, 1))
        return calls


def change_the_routing(group: Any) -> str:
    """Rank 1's router changes between the forward and its recompute: what every rank raises."""
    with process_groups():
        layer = make_layer(CPU, "flex", **WHOLE_LAYER)
        y = layer(hidden_states(CPU, CPU.tokens, 1).requires_grad_())[0]
        if group.rank() == 1:
            layer.router.weight.data.neg_()
        y.sum().backward()
        before = layer.router.weight.detach().clone()
        try:
            torch.optim.SGD(layer.parameters(), lr=1.0).step()
        except EPError as error:
            assert torch.equal(layer.router.weight, before)
            return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def abandon_a_step(group: Any) -> dict[str, Any]:
    """A step that fails between forward and backward, then a whole one with other tokens."""
    with process_groups():
        hidden = hidden_states(CPU, CPU.tokens, 1)
        expected = step(make_layer(CPU, "flex"), hidden * 2)
        layer = make_layer(CPU, "flex", **WHOLE_LAYER)
        with recorded() as (calls, handles):
            try:
                y = layer(hidden.clone().requires_grad_())[0]
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                kept = alive(handles)
                del y
            left = alive(handles)
            calls.clear()
            actual = step(layer, hidden * 2)
        difference = max((expected[name] - actual[name]).abs().max().item() for name in expected)
        return {"kept": kept, "left": left, "calls": calls, "difference": difference}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["compact", "expanded"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_megatrons_layer_dispatches_once_and_trains_the_same(layout: str, micro_batches: int) -> None:
    for found in run_ranks(2, compare_layers, layout, micro_batches):
        assert found["calls"].count("first") == micro_batches
        assert found["calls"].count("cached") == found["calls"].count("gradient") == micro_batches
        assert found["difference"] == 0.0 < found["size"]
        assert found["alive"] == 0
        assert found["eval"] == ["first"] and found["alive after eval"] == 0


def test_a_recomputed_dispatch_is_counted_once() -> None:
    loads = [found["load"] for found in run_ranks(2, compare_layers, "expanded", 2)]
    assert loads == [2 * 2 * CPU.tokens * CPU.topk] * 2


def test_the_reuse_can_be_turned_off() -> None:
    for calls in run_ranks(2, without_reuse):
        assert calls == ["first", "first", "gradient"]


def test_a_changed_routing_is_refused_on_every_rank() -> None:
    for said in run_ranks(2, change_the_routing):
        assert said.startswith("RoutingChangedError: the recomputed forward chose other experts")
        assert "on rank(s) [1]" in said and "REUSE_RECOMPUTE_HANDLE=off" in said


def test_an_abandoned_step_leaves_nothing_for_the_next() -> None:
    for found in run_ranks(2, abandon_a_step):
        assert found == {"kept": 1, "left": 0, "calls": ["first", "cached", "gradient"], "difference": 0.0}


# ------------------------------------------------------------------------ other checkpoints around dispatch and combine


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def _megatrons(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: tensor_parallel.checkpoint(Replayed(function), False, *args)


def _torchs(function: Callable[..., Any], reentrant: bool) -> Callable[..., Any]:
    return lambda *args: checkpoint(Replayed(function), *args, use_reentrant=reentrant)


WRAPS: dict[str, Wrap] = {
    "plain": lambda function: function,
    "Megatron's": _megatrons,
    "torch's": lambda function: _torchs(function, False),
    "torch's, reentrant": lambda function: _torchs(function, True),
    "one inside the other": lambda function: _megatrons(_megatrons(function)),
    "torch's inside Megatron's": lambda function: _megatrons(_torchs(function, False)),
}


@isolated
def two_layers(group: Any, wrap: str, layout: Layout, interleaved: bool) -> tuple[list[torch.Tensor], list[str], int]:
    """Two MoE layers in one checkpoint and two micro-batches, the second's backward first or last: all gradients, the
    dispatches and how many handles are left."""
    case, rank = SMALL, group.rank()
    experts = own_experts(case, rank, all_experts(case))
    batches = [make_batch(case, rank, turn=turn, weights_dtype=torch.float64) for turn in (1, 2)]
    inputs, outputs = [], []

    with recorded() as (calls, handles):
        for turn, batch in enumerate(batches):
            topk_idx = batch.topk_idx.roll(turn, 0)  # each micro-batch has a routing of its own

            def both(x: torch.Tensor, probs: torch.Tensor, topk_idx: torch.Tensor = topk_idx) -> torch.Tensor:
                y = x + moe_layer(x, topk_idx, probs, experts, case.experts, group, layout).tanh()
                return moe_layer(y, topk_idx.flip(1), probs.flip(1), experts, case.experts, group, layout)

            inputs.append((batch.x.requires_grad_(), batch.topk_weights.requires_grad_()))
            outputs.append(WRAPS[wrap](both)(*inputs[-1]))
        for y in reversed(outputs) if interleaved else outputs:
            y.backward(grad_output(case, rank))
        gradients = [y.detach() for y in outputs] + [value.grad for pair in inputs for value in pair]
        left = alive(handles)  # while the user keeps the outputs
        assert not [check for check in device_checks._live.values() if check.count.item()]
        return gradients, calls, left


@isolated
def two_backwards(group: Any, layout: Layout) -> tuple[list[torch.Tensor], list[str], int]:
    """One checkpoint of torch's with two outputs, each with a backward of its own, for which it runs again: gradients,
    dispatches, how many handles are left."""
    case, rank = SMALL, group.rank()
    experts = own_experts(case, rank, all_experts(case))
    batch = make_batch(case, rank, weights_dtype=torch.float64)
    x, probs = batch.x.requires_grad_(), batch.topk_weights.requires_grad_()

    def layer_and_loss(x: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = moe_layer(x, batch.topk_idx, probs, experts, case.experts, group, layout)
        return y, probs.square().sum()

    with recorded() as (calls, handles):
        y, loss = checkpoint(Replayed(layer_and_loss), x, probs, use_reentrant=False)
        loss.backward()
        y.backward(grad_output(case, rank))
        said, left = list(calls), alive(handles)
        again, loss = layer_and_loss(x, probs)
        wanted = torch.autograd.grad([again, loss], [x, probs], [grad_output(case, rank), torch.ones_like(loss)])
        return [x.grad - wanted[0], probs.grad - wanted[1]], said, left


@pytest.mark.slow
@pytest.mark.parametrize("layout", [COMPACT, EXPANDED, PADDED], ids=str)
@pytest.mark.parametrize("wrap", [name for name in WRAPS if name != "plain"])
def test_handles_find_their_layer_and_micro_batch(wrap: str, layout: Layout) -> None:
    """Two micro-batches of two layers, in both orders of the backward."""
    for interleaved in (False, True):
        expected = run_ranks(2, two_layers, "plain", layout, interleaved)
        actual = run_ranks(2, two_layers, wrap, layout, interleaved)
        for (wanted, _, _), (gradients, calls, left) in zip(expected, actual, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
            assert calls.count("first") == 4 and calls.count("gradient") == 4
            assert calls.count("cached") == (8 if "inside" in wrap else 4)
            assert left == 0


@pytest.mark.parametrize("layout", [COMPACT, EXPANDED], ids=str)
def test_each_run_again_replays_the_first(layout: Layout) -> None:
    """Each backward runs the function again, and each run repeats the routing of the first."""
    for differences, calls, left in run_ranks(2, two_backwards, layout):
        assert calls == ["first", "cached", "cached", "gradient"]
        assert max(float(difference.abs().max()) for difference in differences) < 1e-12
        assert left == 0


class Handle:
    """Of no buffer."""


def test_a_run_that_was_broken_off_leaves_the_next_one_all_handles() -> None:
    handles = [Handle(), Handle()]
    seen: list[list[object]] = []

    def two_dispatches(fails: bool) -> None:
        seen.append([])
        for handle in handles:
            taken = recompute.take()
            seen[-1].append(taken)
            if taken is None:
                run.note(handle)
            if fails:
                raise KeyboardInterrupt

    run = recompute.Replayed(two_dispatches)
    run(False)
    with pytest.raises(KeyboardInterrupt):
        run(True)
    run(False)
    assert seen == [[None, None], handles[:1], handles]
