"""`fused_dispatch` and `fused_combine` in real groups: outputs and gradients against the dense fp64 oracle."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.cases import COMPACT, EXPANDED, PADDED, Case, Layout, edge_cases
from tests.helpers.fused_layer import Step, assert_step, grad_output, layer_of, train_step
from tests.helpers.harness import isolated, run_ranks

LAYOUTS = [COMPACT, EXPANDED, PADDED]


@isolated
def train_steps(group: Any, case: Case) -> dict[Layout, Step]:
    return {layout: train_step(case, layout, group) for layout in LAYOUTS}


@functools.lru_cache(maxsize=64)
def steps(case: Case) -> list[dict[Layout, Step]]:
    return run_ranks(case.size, train_steps, case)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", [*edge_cases(2), *edge_cases(4)], ids=str)
def test_outputs_and_gradients_in_fp64(case: Case, layout: Layout) -> None:
    case = replace(case, dtype=torch.float64)
    for rank, by_layout in enumerate(steps(case)):
        assert_step(case, rank, by_layout[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["random-large", "dropped-selections"])
def test_outputs_and_gradients_in_lower_precision(name: str, dtype: torch.dtype, layout: Layout) -> None:
    case = replace(next(case for case in edge_cases(4) if case.name == name), dtype=dtype)
    for rank, by_layout in enumerate(steps(case)):
        step = by_layout[layout]
        assert (step.output.dtype, step.grad_x.dtype, step.grad_probs.dtype) == (dtype, dtype, torch.float32)
        assert_step(case, rank, step)


def test_the_comparison_notices_a_lost_part_of_a_gradient() -> None:
    """A negative control: the tolerances are not so wide that anything passes."""
    case = replace(edge_cases(4)[1], dtype=torch.bfloat16)
    step = steps(case)[1][EXPANDED]
    grad_probs = step.grad_probs.clone()
    grad_probs[:, -1] = 0
    with pytest.raises(AssertionError, match="probabilities"):
        assert_step(case, 1, replace(step, grad_probs=grad_probs))


TINY = Case("tiny", (3, 3), "drop some selections", hidden=4, topk=3, experts=4, dtype=torch.float64, seed=5)
TINY_UNEVEN = replace(TINY, tokens=(4, 1))
TINY_EMPTY = replace(TINY, tokens=(3, 0))


class Rerun(torch.autograd.Function):
    """fn(x, probs) whose backward runs fn again: gradcheck goes backward many times, our handles do so once."""

    @staticmethod
    def forward(ctx: Any, fn: Any, x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        ctx.fn = fn
        ctx.save_for_backward(x, probs)
        return fn(x, probs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            return None, *torch.autograd.grad(ctx.fn(*inputs), inputs, grad)


@isolated
def run_gradcheck(group: Any, case: Case, layout: Layout) -> bool:
    """All ranks have equal shapes, so they perturb one element each, in lockstep; outputs depend on own inputs only."""
    layer, x, probs = layer_of(group, case, layout)
    fn = functools.partial(Rerun.apply, layer)
    return torch.autograd.gradcheck(fn, (x, probs), rtol=1e-5, atol=1e-7, check_undefined_grad=False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradcheck(layout: Layout) -> None:
    assert run_ranks(2, run_gradcheck, TINY, layout) == [True, True]


@isolated
def differentiate(group: Any, case: Case, layout: Layout) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(analytic, numerical) gradients of the group's objective for x and for the probabilities of this rank.

    The objective is a sum over all ranks, and one element of one rank is perturbed at a time: that also shows a
    gradient that arrives at the wrong rank.
    """
    layer, *inputs = layer_of(group, case, layout)
    coefficients = grad_output(case, group.rank())

    def objective() -> float:
        with torch.no_grad():
            total = (layer(*inputs) * coefficients).sum()
        dist.all_reduce(total, group=group)
        return total.item()

    analytic = torch.autograd.grad(layer(*inputs), inputs, coefficients)
    numerical = [torch.zeros_like(tensor) for tensor in inputs]
    sizes = (case.hidden, case.topk)
    elements = [
        (rank, which, i)
        for rank in range(case.size)
        for which in range(2)
        for i in range(case.tokens[rank] * sizes[which])
    ]
    step = 1e-5
    for rank, which, i in elements:
        values = []
        for change in (step, -2 * step, step):  # up, down, and back
            if rank == group.rank():
                inputs[which].detach().view(-1)[i] += change
            values.append(objective())
        if rank == group.rank():
            numerical[which].view(-1)[i] = (values[0] - values[1]) / (2 * step)
    return list(zip(analytic, numerical, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", [TINY_UNEVEN, TINY_EMPTY], ids=["uneven", "one-empty-rank"])
def test_numerical_gradients_of_uneven_ranks(case: Case, layout: Layout) -> None:
    for rank, pairs in enumerate(run_ranks(2, differentiate, case, layout)):
        for name, (analytic, numerical) in zip(("x", "probs"), pairs, strict=True):
            torch.testing.assert_close(analytic, numerical, rtol=1e-6, atol=1e-8, msg=f"{name} on rank {rank}")
            assert analytic.any() or not case.tokens[rank]
