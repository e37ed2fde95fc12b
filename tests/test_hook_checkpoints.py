"""Recompute that comes by saved-tensor hooks, as torch's checkpoint without reentry does it, on a buffer that orders
rows differently in each dispatch: the gradients are those of a step without it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_ep_v2 import gradients
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.device_checks import read_all
from megatron_ep_v2.recompute import Replayed
from tests.helpers.compare import relative_errors, worst
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups
from tests.helpers.shapes import CPU

Forward = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def shuffled() -> Iterator[None]:
    """The reference buffer as deep_ep is: each first dispatch delivers its rows in an order of its own. Rows of one
    expert (expanded, without padding) or all rows (compact) are permuted; cached dispatches repeat their handle's
    order, and combines undo it."""
    dispatch, combine = ReferenceBuffer.dispatch, ReferenceBuffer.combine
    generator = torch.Generator().manual_seed(7)  # not torch's own, whose state a checkpoint restores

    def order_of(handle: Any, num_rows: int) -> torch.Tensor:
        sizes = [int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])]
        if handle.do_expand:
            sizes = handle.num_recv_tokens_per_expert_list
        sizes = [*sizes, *[1] * (num_rows - sum(sizes))]
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        return torch.cat(
            [start + torch.randperm(size, generator=generator) for start, size in zip(starts, sizes, strict=False)]
        )

    def shuffled_dispatch(self: Any, x: torch.Tensor, **arguments: Any) -> Any:
        rows, idx, weights, handle, event = dispatch(self, x, **arguments)
        assert isinstance(rows, torch.Tensor)
        if arguments.get("handle") is None:
            vars(handle)["order"] = order_of(handle, len(rows))
        order = vars(handle)["order"]
        in_order = [None if each is None else each[order] for each in (idx, weights)]
        return rows[order], *in_order, handle, event

    def shuffled_combine(self: Any, x: Any, handle: Any, topk_weights: Any = None, **arguments: Any) -> Any:
        back = vars(handle)["order"].argsort()
        weights = None if topk_weights is None else topk_weights[back]
        return combine(self, x[back], handle, weights, **arguments)

    with (
        mock.patch.object(ReferenceBuffer, "dispatch", shuffled_dispatch),
        mock.patch.object(ReferenceBuffer, "combine", shuffled_combine),
    ):
        yield


def offloaded(forward: Forward, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu():
        return forward(x)


WAYS: dict[str, Callable[[Forward, torch.Tensor], torch.Tensor]] = {
    "again": lambda forward, x: forward(x),
    "reentrant": lambda forward, x: checkpoint(forward, x, use_reentrant=True),
    "without reentry": lambda forward, x: checkpoint(forward, x, use_reentrant=False),
    "one inside the other": lambda forward, x: checkpoint(
        lambda y: checkpoint(forward, y, use_reentrant=False), x, use_reentrant=False
    ),
    "replayed": lambda forward, x: checkpoint(Replayed(forward), x, use_reentrant=False),
    "offloaded": offloaded,
}


def compare(group: Any, layout: str) -> dict[str, float]:
    """Way -> the largest relative distance of a gradient from that of a plain step. What is frozen has none."""
    found = {}
    with process_groups(), shuffled():
        experts = "grouped" if layout == "sync-free" else None
        layer = make_layer(CPU, "flex", layout, experts)
        hidden = hidden_states(CPU, CPU.tokens, 1)

        def step(way: Callable[[Forward, torch.Tensor], torch.Tensor], frozen: bool) -> dict[str, torch.Tensor]:
            layer.zero_grad(set_to_none=True)
            layer.router.requires_grad_(not frozen)
            x = hidden.clone().requires_grad_(not frozen)
            y = way(lambda h: layer(h)[0], x)
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
            read_all()
            found = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
            return {name: grad for name, grad in found.items() if grad is not None}

        for frozen in (False, True):
            wanted = step(WAYS["again"], frozen)
            for name, way in WAYS.items():
                if frozen and name == "reentrant":
                    continue  # torch asks for an input with a gradient
                found[f"{name}, frozen={frozen}"] = worst(relative_errors(step(way, frozen), wanted).values())
        gc.collect()
        found["handles left"] = float(len(gradients._marked))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["compact", "expanded", "sync-free"])
def test_gradients_are_those_of_a_plain_step(layout: str) -> None:
    for found in run_ranks(2, compare, layout):
        assert found.pop("handles left") == 0
        assert len(found) == 2 * len(WAYS) - 1
        assert worst(found.values()) < 1e-5, found


def count(group: Any) -> dict[str, list[int]]:
    """Way -> tokens of each expert after a step."""
    with process_groups():
        layer = make_layer(CPU, "flex", "expanded")
        found = {}
        for way, run in WAYS.items():
            run(lambda h: layer(h)[0], hidden_states(CPU, CPU.tokens, 1).requires_grad_()).sum().backward()
            read_all()
            found[way] = layer.token_dispatcher._comm_manager.expert_load.take().tolist()
    return found


def test_recomputed_tokens_are_counted_once() -> None:
    for found in run_ranks(2, count):
        assert sum(found["again"]) > 0
        assert all(counts == found["again"] for counts in found.values()), found
