"""The life of handles and autograd graphs around `fused_dispatch` and `fused_combine`, in real groups."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_ep_v2.errors import EPError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from tests.helpers import dispatch_oracle as oracle
from tests.helpers.cases import COMPACT, EXPANDED, PADDED, SMALL, Case, Layout, make_batch, make_batches
from tests.helpers.compare import assert_close
from tests.helpers.fused_layer import Step, assert_step, dense, grad_output, layer_of, train_step, weights_dtype
from tests.helpers.harness import isolated, run_ranks

LAYOUTS = [COMPACT, EXPANDED, PADDED]


def dispatch_small(group: Any, layout: Layout, case: Case = SMALL, **kwargs: Any) -> tuple[Any, ...]:
    """(x, probs, recv_x, recv_idx, recv_probs, tokens_per_expert, handle)"""
    batch = make_batch(case, group.rank(), weights_dtype=weights_dtype(case.dtype))
    x, probs = batch.x.requires_grad_(), batch.topk_weights.requires_grad_()
    received = fused_dispatch(x, batch.topk_idx, probs, case.experts, group, **layout.arguments(), **kwargs)
    return x, probs, *received


@isolated
def describe_outputs(group: Any, layout: Layout) -> dict[str, Any]:
    case = replace(SMALL, dtype=torch.bfloat16)
    _, _, recv_x, recv_idx, recv_probs, tokens_per_expert, handle = dispatch_small(group, layout, case)
    return {
        "x": (recv_x.dtype, tuple(recv_x.shape), recv_x.requires_grad),
        "idx": None if recv_idx is None else (recv_idx.dtype, tuple(recv_idx.shape), recv_idx.requires_grad),
        "probs": (recv_probs.dtype, tuple(recv_probs.shape), recv_probs.requires_grad),
        "counts": (tokens_per_expert.dtype, tokens_per_expert.device.type, tokens_per_expert.tolist()),
        "none": fused_combine(recv_x, group, handle)[1],
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_types_and_shapes_are_those_of_megatron(layout: Layout) -> None:
    topk_idx = [batch.topk_idx for batch in make_batches(SMALL)]
    for rank, found in enumerate(run_ranks(2, describe_outputs, layout)):
        expected = oracle.arrival(topk_idx, rank, SMALL.experts, layout.alignment)
        rows = sum(expected.padded) if layout.do_expand else len(expected.rows)
        weights = (rows,) if layout.do_expand else (rows, SMALL.topk)
        assert found == {
            "x": (torch.bfloat16, (rows, SMALL.hidden), True),
            "idx": None if layout.do_expand else (torch.int64, (rows, SMALL.topk), False),
            "probs": (torch.float32, weights, True),
            "counts": (torch.int64, "cpu", expected.padded),
            "none": None,
        }


@isolated
def follow_handle(group: Any, layout: Layout, grad: bool) -> list[bool]:
    """Whether the handle lives: after the forward, after the backward; the output is kept, nothing else."""
    gc.disable()  # what only the garbage collector frees is not freed in time
    try:
        with torch.set_grad_enabled(grad):
            _, _, recv_x, _, _, _, handle = dispatch_small(group, layout)
            output, _ = fused_combine(recv_x * 1, group, handle)
        watched = weakref.ref(handle)
        del recv_x, handle
        alive = [watched() is not None]
        if grad:
            output.backward(torch.ones_like(output))
            alive.append(watched() is not None)
        return alive
    finally:
        gc.enable()


@pytest.mark.parametrize("layout", [COMPACT, PADDED], ids=str)
def test_handles_live_as_long_as_a_backward_needs_them(layout: Layout) -> None:
    assert run_ranks(2, follow_handle, layout, False) == [[False]] * 2, "without gradients: not after the combine"
    assert run_ranks(2, follow_handle, layout, True) == [[True, False]] * 2, "a kept loss must not keep the handle"


@isolated
def several_batches(group: Any, cases: list[Case], layout: Layout, order: tuple[int, ...]) -> list[list[torch.Tensor]]:
    """Gradients of x and probs of several micro-batches that are in flight together, backward in `order`."""
    leaves, outputs = [], []
    for case in cases:
        layer, x, probs = layer_of(group, case, layout)
        leaves.append([x, probs])
        outputs.append(layer(x, probs))
    for i in order:
        outputs[i].backward(grad_output(cases[i], group.rank()))
    return [[x.grad, probs.grad] for x, probs in leaves]


@pytest.mark.parametrize("layout", [COMPACT, EXPANDED], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_backward_of_micro_batches_in_any_order(order: tuple[int, ...], layout: Layout) -> None:
    cases = [replace(SMALL, tokens=tokens, seed=seed) for seed, tokens in enumerate([(6, 4), (3, 6), (0, 5)])]
    for rank, gradients in enumerate(run_ranks(2, several_batches, cases, layout, order)):
        for case, (grad_x, grad_probs) in zip(cases, gradients, strict=True):
            assert_close("x", grad_x, dense(case).grad_x[rank], 1e-13)
            assert_close("probs", grad_probs, dense(case).grad_probs[rank], 1e-13)


@isolated
def combine_twice(group: Any, layout: Layout) -> list[torch.Tensor]:
    x, _, recv_x, _, _, _, handle = dispatch_small(group, layout)
    first, _ = fused_combine(recv_x, group, handle)
    second, _ = fused_combine(recv_x**3, group, handle)
    (first + 10 * second).backward(grad_output(SMALL, group.rank()))
    return [x, first, second, x.grad]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_handle_serves_two_combines(layout: Layout) -> None:
    for rank, (x, first, second, grad) in enumerate(run_ranks(2, combine_twice, layout)):
        topk_idx = make_batch(SMALL, rank).topk_idx.tolist()
        terms = [
            (layout.do_expand and SMALL.topk) or len(oracle.destinations(i, SMALL.local_experts)) for i in topk_idx
        ]
        copies = torch.tensor(terms)[:, None]
        assert_close("first", first, copies * x, 1e-13)
        assert_close("second", second, copies * x**3, 1e-13)
        assert_close("gradient", grad, copies * (1 + 30 * x**2) * grad_output(SMALL, rank), 1e-13)


@isolated
def use_one_output(group: Any, layout: Layout, which: str) -> list[torch.Tensor]:
    case = replace(SMALL, routing="drop some selections")
    x, probs, recv_x, recv_idx, recv_probs, _, _ = dispatch_small(group, layout, case)
    if which == "none":
        Forget.apply(recv_x + recv_probs.sum()).sum().backward()
        return [x.grad, probs.grad]
    real = recv_probs if layout.do_expand else recv_probs[recv_idx >= 0]
    (recv_x.sum() if which == "x" else real.sum()).backward()
    return [x.grad, probs.grad]


class Forget(torch.autograd.Function):
    """Identity without a gradient, though autograd expects one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("which", ["x", "probs", "none"])
def test_a_gradient_through_one_output_only(which: str, layout: Layout) -> None:
    case = replace(SMALL, routing="drop some selections")
    for rank, (grad_x, grad_probs) in enumerate(run_ranks(2, use_one_output, layout, which)):
        topk_idx = make_batch(case, rank).topk_idx
        if which != "x":
            assert torch.equal(
                grad_probs, (topk_idx >= 0).double() if which == "probs" else torch.zeros(topk_idx.shape).double()
            )
            assert not grad_x.any()
            continue
        ranks = [len(oracle.destinations(ids, case.local_experts)) for ids in topk_idx.tolist()]
        copies = (topk_idx >= 0).sum(dim=1) if layout.do_expand else torch.tensor(ranks)
        assert torch.equal(grad_x, copies[:, None].double().expand_as(grad_x))
        assert not grad_probs.any()


@isolated
def freeze_one_input(group: Any, layout: Layout, frozen: int) -> list[torch.Tensor | None]:
    layer, *inputs = layer_of(group, SMALL, layout)
    inputs[frozen].requires_grad_(False)
    layer(*inputs).backward(grad_output(SMALL, group.rank()))
    return [tensor.grad for tensor in inputs]


@pytest.mark.parametrize("layout", [COMPACT, PADDED], ids=str)
@pytest.mark.parametrize("frozen", [0, 1], ids=["x", "probs"])
def test_an_input_without_gradient(frozen: int, layout: Layout) -> None:
    for rank, gradients in enumerate(run_ranks(2, freeze_one_input, layout, frozen)):
        expected = [dense(SMALL).grad_x[rank], dense(SMALL).grad_probs[rank]]
        assert gradients[frozen] is None
        assert_close("the other's gradient", gradients[1 - frozen], expected[1 - frozen], 1e-13)


@isolated
def recompute(group: Any, layout: Layout, use_reentrant: bool) -> list[torch.Tensor]:
    layer, x, probs = layer_of(group, SMALL, layout)
    output = checkpoint(layer, x, probs, use_reentrant=use_reentrant)
    output.backward(grad_output(SMALL, group.rank()))
    return [output, x.grad, probs.grad]


@pytest.mark.parametrize("layout", [COMPACT, PADDED], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, layout: Layout) -> None:
    for rank, (output, grad_x, grad_probs) in enumerate(run_ranks(2, recompute, layout, use_reentrant)):
        assert_close("output", output, dense(SMALL).output[rank], 1e-13)
        assert_close("x", grad_x, dense(SMALL).grad_x[rank], 1e-13)
        assert_close("probs", grad_probs, dense(SMALL).grad_probs[rank], 1e-13)


@isolated
def step_on_streams(group: Any, layout: Layout) -> Step:
    return train_step(SMALL, layout, group, async_finish=True, allocate_on_comm_stream=True)


@pytest.mark.parametrize("layout", [COMPACT, PADDED], ids=str)
def test_stream_arguments_change_nothing(layout: Layout) -> None:
    for rank, step in enumerate(run_ranks(2, step_on_streams, layout)):
        assert_step(SMALL, rank, step)


@isolated
def backward_twice(group: Any, layout: Layout) -> str:
    layer, x, probs = layer_of(group, SMALL, layout)
    total = layer(x, probs).sum()
    total.backward(retain_graph=True)
    try:
        total.backward()
    except EPError as error:
        return str(error)
    return "nothing was raised"


def test_a_second_backward_is_refused_with_a_remedy() -> None:
    for message in run_ranks(2, backward_twice, COMPACT):
        assert "second time" in message and "fix:" in message
