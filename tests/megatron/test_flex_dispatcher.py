"""Megatron-Core's `MoEFlexTokenDispatcher` on the reference buffer: what its own tests ask of it on GPUs, and more."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_ep_v2
from tests.helpers.compare import relative_error
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import CAPACITY_FACTOR, FlexLayer, hidden_states, installed
from tests.helpers.shapes import Shape, Split

SPLITS = [Split(1, 2), Split(2, 1), Split(2, 2), Split(1, 8), Split(8, 1), Split(2, 4), Split(4, 2)]
SHAPES = [Shape(torch.bfloat16, 2, hidden=1024), Shape(torch.float32, 4, hidden=256)]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 5e-6}  # relative L2
ROUNDING = {torch.bfloat16: 0.0, torch.float32: 1e-6}  # of each element: halves add up exactly, three quarters do not


def restore(shape: Shape, split: Split) -> None:
    """With equal probabilities and experts that do nothing, tokens come back as they were, and so do gradients."""
    layer = FlexLayer(shape, split)
    hidden = hidden_states(shape, 32, 8).requires_grad_()
    _, routing_map = layer.router(hidden.detach())
    rows, counts, row_probs = layer.dispatch(hidden, routing_map / shape.topk, routing_map)
    assert row_probs.dtype == torch.float32 and row_probs.shape == (len(rows),)
    assert rows.dtype == hidden.dtype and not row_probs[counts.sum() :].any(), "rows of no expert"
    assert torch.equal(counts.long(), counts_of_group(layer, routing_map))
    restored = layer.combine((rows * row_probs[:, None]).to(rows.dtype)) / split.tp
    assert_close = functools.partial(torch.testing.assert_close, rtol=ROUNDING[shape.dtype], atol=0.0)
    assert_close(restored, hidden)
    restored.backward(hidden.detach())
    assert_close(hidden.grad, hidden)


def weigh(shape: Shape, split: Split) -> None:
    """With the router's probabilities and experts that differ: outputs and gradients of the dense layer."""
    layer = FlexLayer(shape, split)
    results = []
    for forward in (layer, layer.dense):
        hidden = hidden_states(shape, 32, 8).requires_grad_()
        layer.router.zero_grad()
        output = forward(hidden)
        output.backward(hidden_states(shape, 32, 8, seed=1).to(output.dtype))
        results.append({"output": output, "hidden": hidden.grad, "router": layer.router.weight.grad})
    for name, expected in results[1].items():
        assert expected.norm() > 0
        error = relative_error(results[0][name], expected)
        assert error <= TOLERANCE[shape.dtype], f"{name}: relative L2 error {error:.3g}"


def drop(shape: Shape, split: Split) -> None:
    """Half of what the experts are asked for: no expert gets more, and a dropped selection adds nothing."""
    layer = FlexLayer(shape, split, **CAPACITY_FACTOR)
    hidden = hidden_states(shape, 16).requires_grad_()
    probs, routing_map = layer.router(hidden.detach())
    assert torch.equal(probs != 0, routing_map)
    expected = hidden.detach() * (routing_map.sum(dim=1, keepdim=True) / shape.topk).to(hidden.dtype)
    rows, counts, row_probs = layer.dispatch(hidden, routing_map / shape.topk, routing_map)
    capacity = math.ceil(0.5 * len(hidden) * shape.topk / shape.experts)  # of one rank
    assert (counts <= capacity * split.size).all()
    assert torch.equal(counts.long(), counts_of_group(layer, routing_map))
    assert routing_map.sum() <= 0.5 * len(hidden) * shape.topk, "nothing was dropped"
    output = layer.combine((rows * row_probs[:, None]).to(rows.dtype)) / split.tp
    assert_close = functools.partial(torch.testing.assert_close, rtol=ROUNDING[shape.dtype], atol=0.0)
    assert_close(output, expected)
    output.backward(hidden.detach())
    assert_close(hidden.grad, expected)


def counts_of_group(layer: FlexLayer, routing_map: torch.Tensor) -> torch.Tensor:
    """Rows that each local expert must get: the selections of all ranks."""
    counts = routing_map.sum(dim=0)
    dist.all_reduce(counts)
    return counts[layer.local_experts]


def run_bodies(group: Any, split: Split, *layouts: str) -> None:
    with installed(split):
        for layout in layouts:
            sync_free = {"sync_free": True, "sync_free_rows_percent": 0}
            megatron_ep_v2.install(buffer="reference", **(sync_free if layout == "sync-free" else {"layout": layout}))
            for body in (restore, weigh, drop):
                for shape in SHAPES:
                    megatron_ep_v2.destroy_buffers()  # of the shape before
                    try:
                        body(shape, split)
                    except AssertionError as error:
                        raise AssertionError(f"{layout}, {body.__name__}, {shape}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_forward_and_backward(split: Split) -> None:
    run_ranks(split.size, run_bodies, split, "compact", "expanded")
