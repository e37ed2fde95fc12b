"""What Megatron-Core's flex dispatcher keeps and shares on this package: buffers, handles, counts, dtypes, capacity."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import ClosedError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from tests.helpers import compare
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import FlexLayer, hidden_states, installed
from tests.helpers.reports import log_records
from tests.helpers.shapes import CPU, Shape, Split

EP2 = Split(1, 2)
LAYOUTS = ["compact", "expanded"]

pytestmark = pytest.mark.parametrize("layout", LAYOUTS)


assert_close = functools.partial(compare.assert_close, tolerance=5e-6)  # in fp32


def dense_step(layers: list[FlexLayer], hidden: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the dense layers, and the gradient of what goes into the first."""
    hidden = hidden.detach().clone().requires_grad_()
    output = hidden
    for layer in layers:
        output = layer.dense(output)
    output.backward(grad)
    return output.detach(), hidden.grad


# ----------------------------------------------------------------------------------------------- one buffer for a group


def run_two_layers(group: Any, layout: str) -> None:
    with installed(EP2, layout=layout):
        layers = [FlexLayer(CPU, EP2, number) for number in (1, 2)]
        hidden, grad = hidden_states(CPU, 20).requires_grad_(), hidden_states(CPU, 20, seed=1)
        for _ in range(2):
            hidden.grad = None
            output = layers[1](layers[0](hidden))
            output.backward(grad)
            expected, expected_grad = dense_step(layers, hidden, grad)
            assert_close("output", output, expected)
            assert_close("gradient", hidden.grad, expected_grad)
        [buffer] = pool.buffers()
        assert buffer.group.size() == 2
        assert len(megatron_ep_v2.status()["buffers"]) == 1


def test_layers_share_one_buffer(layout: str) -> None:
    run_ranks(2, run_two_layers, layout)


def run_micro_batches(group: Any, layout: str, order: list[int]) -> None:
    with installed(EP2, layout=layout, num_max_tokens_per_rank=24):
        layers = [FlexLayer(CPU, EP2, number) for number in (1, 2)]
        tokens = [(20, 7), (3, 24), (11, 11)]  # of each rank
        inputs = [hidden_states(CPU, t[group.rank()], seed=i).requires_grad_() for i, t in enumerate(tokens)]
        grads = [hidden_states(CPU, len(hidden), seed=10) for hidden in inputs]
        outputs = [layers[1](layers[0](hidden)) for hidden in inputs]
        for i in order:
            outputs[i].backward(grads[i])
        for hidden, output, grad in zip(inputs, outputs, grads):
            expected, expected_grad = dense_step(layers, hidden, grad)
            assert_close("output", output, expected)
            assert_close("gradient", hidden.grad, expected_grad)


@pytest.mark.slow
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]], ids=str)
def test_several_micro_batches_in_flight(layout: str, order: list[int]) -> None:
    """All forwards first: the manager's attributes are those of the last one when the first backward runs."""
    run_ranks(2, run_micro_batches, layout, order)


def destroy_groups(group: Any, layout: str) -> None:
    with installed(EP2, layout=layout):
        other = dist.new_group([0, 1])
        FlexLayer(CPU, EP2)(hidden_states(CPU, 5))
        x, topk_idx = hidden_states(CPU, 5), torch.zeros(5, 1, dtype=torch.int64)
        *_, handle = fused_dispatch(x, topk_idx, torch.ones(5, 1), 2, other)
        first, second = pool.buffers()
        dist.destroy_process_group(other)
        assert pool.buffers() == [first]
        with pytest.raises(ClosedError):
            second.combine(x, handle)
        dist.destroy_process_group()
        assert pool.buffers() == []
        with pytest.raises(ClosedError):
            fused_combine(x, group, handle)


def test_destroying_a_process_group_destroys_its_buffers(layout: str) -> None:
    run_ranks(2, destroy_groups, layout)


# -------------------------------------------------------------------------------------------------------------- handles


def follow_handles(group: Any, layout: str, mode: str) -> None:
    """Three steps whose outputs are kept, as a user keeps losses; nothing else is."""
    gc.disable()  # what only the garbage collector frees is not freed in time
    try:
        with installed(EP2, layout=layout), contextlib.ExitStack() as stack:
            layer, kept = FlexLayer(CPU, EP2), []
            if mode != "train":
                layer.router.eval()
                stack.enter_context(torch.no_grad() if mode == "no_grad" else torch.inference_mode())
            for step in range(3):
                hidden = hidden_states(CPU, 9).requires_grad_(mode == "train")
                rows, _, row_probs = layer.dispatch(hidden, *layer.router(hidden))
                handle = weakref.ref(layer.manager.handle)
                assert handle() is not None
                kept.append(layer.combine(rows * row_probs[:, None]))
                del rows, row_probs
                assert layer.manager.handle is None, "the manager gives it up with the combine"
                if mode == "train":
                    assert handle() is not None, "the backward needs it"
                    kept[-1].sum().backward()
                assert handle() is None, f"the handle of step {step} lives on"
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "no_grad", "inference_mode"])
def test_no_handle_outlives_its_step(layout: str, mode: str) -> None:
    run_ranks(2, follow_handles, layout, mode)


# -------------------------------------------------------------------------------------------------------- uneven ranks


def run_uneven_ranks(group: Any, layout: str, tokens: tuple[int, ...]) -> None:
    split = Split(1, len(tokens))
    with installed(split, layout=layout):
        layer = FlexLayer(CPU, split, moe_aux_loss_coeff=0.0)  # a mean over no tokens is not a number
        hidden = hidden_states(CPU, tokens[group.rank()]).requires_grad_()
        grad = hidden_states(CPU, len(hidden), seed=1)
        output = layer(hidden)
        output.backward(grad)
        expected, expected_grad = dense_step([layer], hidden, grad)
        assert_close("output", output, expected)
        assert_close("gradient", hidden.grad, expected_grad)
        [buffer] = pool.buffers()
        assert buffer.num_max_tokens_per_rank == max(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [(13, 5), (0, 8), (8, 0), (3, 0, 17, 1)], ids=str)
def test_ranks_with_different_numbers_of_tokens(layout: str, tokens: tuple[int, ...]) -> None:
    run_ranks(len(tokens), run_uneven_ranks, layout, tokens)


# ------------------------------------------------------------------------------------------------- dtypes and alignment


def use_fp64_router(group: Any, layout: str) -> None:
    with installed(EP2, layout=layout):
        layer = FlexLayer(CPU, EP2, moe_router_dtype="fp64")
        hidden, grad = hidden_states(CPU, 20).requires_grad_(), hidden_states(CPU, 20, seed=1)
        probs, routing_map = layer.router(hidden.detach())
        assert probs.dtype == torch.float64
        probs = probs.detach().requires_grad_()
        rows, counts, row_probs = layer.dispatch(hidden, probs, routing_map)
        assert row_probs.dtype == torch.float64
        weights = row_probs * layer.local_factors.repeat_interleave(counts)
        layer.combine((rows * weights[:, None]).to(rows.dtype)).backward(grad)
        factors = layer.factors.sum(dim=1)
        expected = (hidden * grad).sum(dim=1, keepdim=True) * factors * routing_map
        assert probs.grad.dtype == torch.float64
        assert_close("gradient of the probabilities", probs.grad, expected)
        assert_close("gradient", hidden.grad, grad * (probs @ factors.double())[:, None])


def test_an_fp64_router(layout: str) -> None:
    run_ranks(2, use_fp64_router, layout)


def use_bf16_router(group: Any, layout: str) -> list[str]:
    shape = Shape(torch.bfloat16)
    with log_records("") as records, installed(EP2, layout=layout):
        layer = FlexLayer(shape, EP2, moe_router_dtype=None)
        hidden = hidden_states(shape, 20).requires_grad_()
        assert layer.router(hidden)[0].dtype == torch.bfloat16
        output = layer(hidden)
        output.backward(hidden_states(shape, 20, seed=1))
        assert output.dtype == hidden.grad.dtype == torch.bfloat16
        assert compare.relative_error(output, layer.dense(hidden)) < 1e-2
    return [record.getMessage() for record in records]


def test_a_bf16_router_works_and_is_advised_against(layout: str) -> None:
    for messages in run_ranks(2, use_bf16_router, layout):
        assert any("moe-router-dtype" in message for message in messages)


def pad_for_quantisation(group: Any, layout: str) -> None:
    with installed(EP2, layout=layout):
        layer = FlexLayer(CPU, EP2)
        # Set afterwards: the configuration itself would ask for TransformerEngine.
        layer.config.fp8, layer.config.moe_router_padding_for_quantization = "hybrid", True
        hidden, grad = hidden_states(CPU, 100).requires_grad_(), hidden_states(CPU, 100, seed=1)
        probs, routing_map = layer.router(hidden.detach())
        rows, counts, row_probs = layer.dispatch(hidden, probs.detach(), routing_map)
        assert (counts % 16 == 0).all() and len(rows) == len(row_probs) == counts.sum()
        assert rows.isfinite().all() and row_probs.isfinite().all(), "padding is read by quantised GEMMs"
        real = routing_map.sum(dim=0)
        dist.all_reduce(real)
        assert ((counts - real[layer.local_experts]) < 16).all() and (counts != real[layer.local_experts]).any()
        weights = row_probs * layer.local_factors.repeat_interleave(counts)
        output = layer.combine(rows * weights[:, None])
        output.backward(grad)
        expected = (probs.detach() @ layer.factors.sum(dim=1))[:, None]
        assert_close("output", output, hidden * expected)
        assert_close("gradient", hidden.grad, grad * expected)


def test_padding_for_quantised_experts(layout: str) -> None:
    run_ranks(2, pad_for_quantisation, layout)
