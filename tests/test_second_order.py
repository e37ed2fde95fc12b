"""The gradient of a gradient: an error wherever it would be needed and is not there, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ep_v2.errors import EPError
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import swiglu_experts
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.layouts import gather_rows, gather_weights, place_contiguous, reduce_rows
from megatron_ep_v2.started_a2a import finish_combine, finish_dispatch, start_combine, start_dispatch
from tests.helpers.harness import isolated, run_ranks

TOPK_IDX = torch.tensor([[0, 3], [2, 1], [1, 3], [3, 0], [0, 2], [2, 3]])


def second(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> str:
    """The error of a gradient penalty on `function`, whose gradient itself must be there."""
    (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
    penalty = grad.square().sum() + 0 * x.sum()  # as any other term of a loss, it keeps a path to x
    try:
        torch.autograd.grad(penalty, x)
    except EPError as error:
        return str(error)
    return ""


@isolated
def exchange(group: Any, do_expand: bool, started: bool) -> tuple[str, torch.Tensor]:
    """A penalty on the square of y = 2x, and the second gradient of a loss that is linear in x."""

    def doubled(x: torch.Tensor) -> torch.Tensor:
        if started:
            dispatch = start_dispatch(x, TOPK_IDX, torch.ones(6, 2).double(), 4, group)
            assert dispatch is not None
            rows, _, _, handle = finish_dispatch(dispatch)
            combine = start_combine(rows, group, handle)
            assert combine is not None
            return finish_combine(combine)
        rows, idx, _, _, handle = fused_dispatch(x, TOPK_IDX, torch.ones(6, 2).double(), 4, group, do_expand=do_expand)
        if not do_expand:  # one row a rank stands for as many selections as it has
            rows = rows * (idx >= 0).sum(1, keepdim=True)
        return fused_combine(rows, group, handle)[0]

    x = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(group.rank())).requires_grad_()
    said = second(lambda x: doubled(x).square().sum(), x)
    (grad,) = torch.autograd.grad(doubled(x).sum(), x, create_graph=True)
    (none,) = torch.autograd.grad(grad.square().sum() + 0 * x.sum(), x)
    return said, none


@pytest.mark.parametrize(("do_expand", "started"), [(False, False), (True, False), (True, True)])
def test_a_penalty_through_dispatch_and_combine(do_expand: bool, started: bool) -> None:
    for said, of_a_constant in run_ranks(2, exchange, do_expand, started):
        assert "gradient of a gradient" in said and "alltoall" in said
        assert not of_a_constant.any()  # 2 has no gradient, and nothing is refused


PLACES = place_contiguous(torch.tensor([[0, 2], [1, 0], [2, -1]]), None, 3, 8, 1)
WEIGHTS = torch.rand(3, 2, dtype=torch.float64)
ROWS = torch.rand(8, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: gather_rows(x, PLACES).square().sum(), (3, 4)),
        (lambda x: gather_weights(x, PLACES).square().sum(), (3, 2)),
        (lambda x: reduce_rows(x, PLACES).square().sum(), (8, 4)),
        (lambda x: reduce_rows(x, PLACES, WEIGHTS).square().sum(), (8, 4)),
        # Linear in the rows and in the weights, and yet each one's gradient depends on the other.
        (lambda x: reduce_rows(ROWS * x.sum(), PLACES, x).sum(), (3, 2)),
    ],
)
def test_a_penalty_through_a_layout(function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> None:
    assert "gradient of a gradient" in second(function, torch.rand(shape, dtype=torch.float64).requires_grad_())


def test_a_penalty_on_experts_whose_loss_is_linear() -> None:
    """Their gradient depends on what they saved, although the loss' own is a constant."""
    x, probs = torch.rand(4, 8, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    w1, w2 = (torch.rand(shape, dtype=torch.float64) for shape in ((2, 6, 8), (2, 8, 3)))
    groups = Groups.from_counts(torch.tensor([3, 1]), x)
    said = second(lambda x: swiglu_experts(x, probs, w1, w2, groups, "sequential").sum(), x.requires_grad_())
    assert "gradient of a gradient" in said
