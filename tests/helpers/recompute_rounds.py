"""What ranks do in the tests of recompute, on CPUs and GPUs: Megatron's real MoE layer under its own checkpoint, and
other checkpoints around the bare dispatch and combine."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch.utils.checkpoint import checkpoint

import megatron_ep_v2
from megatron_ep_v2 import device_checks
from megatron_ep_v2.buffers import reference
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.recompute import Replayed
from tests.helpers.cases import SMALL, Layout, make_batch
from tests.helpers.fused_layer import all_experts, grad_output, moe_layer, own_experts
from tests.helpers.harness import isolated
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups, step
from tests.helpers.moe_features import WHOLE_LAYER
from tests.helpers.shapes import Shape


@contextmanager
def recorded(kind: Any = reference.ReferenceBuffer) -> Iterator[tuple[list[str], list[Any]]]:
    """(each dispatch as "first" or "cached" and "gradient", weak references to the handles of the first ones)."""
    calls: list[str] = []
    handles: list[Any] = []
    dispatch = kind.dispatch

    def seen(self: Any, x: Any, **arguments: Any) -> Any:
        answer = dispatch(self, x, **arguments)
        if arguments.get("handle") is None:
            calls.append("first")
            handles.append(weakref.ref(answer[3]))
        else:
            calls.append("cached" if arguments.get("topk_weights") is not None else "gradient")
        return answer

    kind.dispatch = seen
    try:
        yield calls, handles
    finally:
        kind.dispatch = dispatch


def alive(handles: list[Any]) -> int:
    gc.collect()
    return sum(handle() is not None for handle in handles)


def compare_layers(group: Any, shape: Shape, layout: str, micro_batches: int) -> dict[str, Any]:
    """Gradients of the real layer with and without recompute: the largest difference, and the dispatches of each."""
    found: dict[str, Any] = {}
    with process_groups():
        hidden = hidden_states(shape, shape.tokens, 1)
        plain = step(make_layer(shape, "flex", layout), hidden, micro_batches)
        layer = make_layer(shape, "flex", layout, **WHOLE_LAYER)
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


def without_reuse(group: Any, shape: Shape) -> list[str]:
    """The dispatches of a recomputed layer where the user has turned the reuse off."""
    with process_groups():
        layer = make_layer(shape, "flex", **WHOLE_LAYER)
        megatron_ep_v2.install(buffer=shape.buffer, num_max_tokens_per_rank=shape.tokens, reuse_recompute_handle=False)
        with recorded() as (calls, _):
            step(layer, hidden_states(shape, shape.tokens, 1))
        return calls


def change_the_routing(group: Any, shape: Shape) -> str:
    """Rank 1's router changes between the forward and its recompute: what every rank raises."""
    with process_groups():
        layer = make_layer(shape, "flex", **WHOLE_LAYER)
        y = layer(hidden_states(shape, shape.tokens, 1).requires_grad_())[0]
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


def abandon_a_step(group: Any, shape: Shape) -> dict[str, Any]:
    """A step that fails between forward and backward, then a whole one with other tokens."""
    with process_groups():
        hidden = hidden_states(shape, shape.tokens, 1)
        expected = step(make_layer(shape, "flex"), hidden * 2)
        layer = make_layer(shape, "flex", **WHOLE_LAYER)
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
