"""Megatron's CUDA graphs of a part of the MoE layer: router and preprocessing in the graph, dispatch, experts and
combine outside. What the graph returns (`cudagraph_attrs`) has to be all that the second part needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer import enums
from megatron.core.transformer.moe import moe_utils

import megatron_ep_v2
from megatron_ep_v2.device_checks import read_all
from tests.buffers.test_kept_selections import keeping
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import build_layer, hidden_states, make_layer, process_groups, step
from tests.helpers.shapes import CPU

PARTS = ("moe_router", "moe_preprocess")


@contextlib.contextmanager
def graphed(layer: Any, capturing: bool) -> Iterator[None]:
    """TransformerEngine's graphs are on for a layer."""
    config = layer.config
    kind, field = (
        (enums.CudaGraphModule, "cuda_graph_modules")  # from 0.18 on
        if hasattr(enums, "CudaGraphModule")
        else (enums.CudaGraphScope, "cuda_graph_scope")
    )
    parts = [kind[name] for name in PARTS]
    with (
        mock.patch.object(config, "cuda_graph_impl", "transformer_engine"),
        mock.patch.object(config, field, parts),
        mock.patch.object(moe_utils, "is_graph_capturing", lambda: capturing),
    ):
        yield


def in_two_parts(first: Any, second: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The layer's output as Megatron's transformer layer gets it from a replay: the graph has run `first`'s router, and
    `second` has only been captured, with other values. A later graph then writes to the memory of the selections."""
    with graphed(second, True):
        second(hidden_states(CPU, *hidden.shape[:-1], seed=7))
    with graphed(first, True):
        rows, probs, *attributes = first(hidden)
    dispatcher = second.token_dispatcher
    assert len(attributes) == len(dispatcher.valid_cudagraph_attrs) == 2
    for name, value in zip(dispatcher.valid_cudagraph_attrs, attributes, strict=True):
        parent, _, leaf = name.rpartition(".")
        setattr(getattr(dispatcher, parent), leaf, value)
    with graphed(second, False):
        second.cudagraph_tensor_store.set(hidden_states=rows, probs=probs)
        output: torch.Tensor = second(hidden)[0]
        second.cudagraph_tensor_store.clear()
    attributes[1].fill_(0)
    return output


def compare(group: Any, layout: str) -> list[tuple[str, bool]]:
    """For each output and gradient of two micro-batches, whether it has the bits of a layer without graphs. The
    buffer's handles keep the selections, as DeepEP 2.5's do."""
    with process_groups(), keeping():
        first, second = make_layer(CPU, "flex", layout, "grouped"), build_layer(CPU, "flex", "grouped")
        second.load_state_dict(first.state_dict())
        hidden = hidden_states(CPU, 8, 2)
        wanted = step(first, hidden)
        read_all()
        found = []
        for _ in range(2):  # the combine forgets what the dispatch was given
            first.zero_grad(set_to_none=True)
            second.zero_grad(set_to_none=True)
            x = hidden.detach().requires_grad_()
            y = in_two_parts(first, second, x)
            y.backward(torch.ones_like(y))
            read_all()
            ours = {"output 0": y.detach(), "gradient of x 0": x.grad}
            for name, p in first.named_parameters():
                ours[name] = (p if "router" in name else second.get_parameter(name)).grad
            found += [(name, torch.equal(ours[name], value)) for name, value in wanted.items()]
        megatron_ep_v2.destroy_buffers()
    return found


@pytest.mark.parametrize("layout", ["compact", "expanded", "sync-free"])
def test_the_second_part_needs_only_what_the_graph_returns(layout: str) -> None:
    for found in run_ranks(2, compare, layout):
        assert len(found) == 2 * 5 and all(equal for _, equal in found), found
