"""A recompute whose router repeats almost, but not bit by bit: near ties are counted, a changed routing is refused."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from torch.utils.checkpoint import checkpoint

from megatron_ep_v2 import device_checks, recompute
from megatron_ep_v2.errors import RoutingChangedError
from megatron_ep_v2.kernels import replay as kernels
from megatron_ep_v2.recompute import Replayed
from tests.helpers import megatron_layer  # noqa: F401  (lets Megatron's checkpoint run without a GPU)
from tests.helpers.cases import COMPACT, EXPANDED, SMALL, Layout, make_batch
from tests.helpers.fused_layer import all_experts, grad_output, moe_layer, own_experts
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.interpreter import child, needs_triton
from tests.helpers.replay_kernels import wrong


class Buffer:
    """Of one rank."""

    group = None


def replay(idx: list[list[int]], weights: list[list[float]], again: list[list[int]], new: list[list[float]]) -> Any:
    """What a second run sends that selects `again` with `new` probabilities; and the buffer, which owns the counts."""
    first = SimpleNamespace(topk_idx=torch.tensor(idx), topk_weights=torch.tensor(weights))
    buffer = Buffer()
    return recompute.as_first(first, torch.tensor(again), torch.tensor(new), buffer).tolist(), buffer


def test_columns_in_another_order_are_the_same_routing(caplog: pytest.LogCaptureFixture) -> None:
    sent, _buffer = replay([[4, 7, -1]], [[0.5, 0.25, 0.0]], [[-1, 4, 7]], [[0.0, 0.625, 0.375]])
    assert sent == [[0.625, 0.375, 0.0]]
    with caplog.at_level(logging.WARNING):
        device_checks.read_all()
    assert not caplog.records


def test_a_near_tie_is_counted_and_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    idx, weights = [[4, 7], [1, 2]], [[0.75, 0.250], [0.5, 0.5]]
    sent, buffer = replay(idx, weights, [[9, 4], [1, 2]], [[0.251, 0.75], [0.5, 0.5]])
    assert sent == [[0.75, pytest.approx(0.251)], [0.5, 0.5]]
    with caplog.at_level(logging.WARNING):
        device_checks.read_all()
        (record,) = caplog.records
        assert "1 selections" in record.getMessage() and "near ties" in record.getMessage()
        assert "random" not in record.getMessage()
        recompute.as_first(
            SimpleNamespace(topk_idx=torch.tensor(idx), topk_weights=torch.tensor(weights)),
            *(torch.tensor([[4, 9], [1, 2]]), torch.tensor(weights), buffer),
        )
        device_checks.read_all()
    assert len(caplog.records) == 1  # the next one at ten


@pytest.mark.parametrize(
    ("again", "new"),
    [
        ([[4, 9], [1, 2]], [[0.75, 0.125], [0.5, 0.5]]),  # far from a tie
        ([[4, 9], [1, 3]], [[0.75, 0.25], [0.5, 0.5]]),  # too many
        ([[5, 9], [0, 3]], [[0.75, 0.25], [0.5, 0.5]]),  # all
    ],
)
def test_a_changed_routing_is_refused(again: list[list[int]], new: list[list[float]]) -> None:
    _, _buffer = replay([[4, 7], [1, 2]], [[0.75, 0.25], [0.5, 0.5]], again, new)
    if again[1] == [1, 3]:  # 2 of 4 are more than a quarter
        assert recompute.MOST_CHANGED < 0.5
    with pytest.raises(RoutingChangedError, match="chose other experts") as caught:
        device_checks.read_all()
    assert "REUSE_RECOMPUTE_HANDLE=off" in str(caught.value) and "random" not in str(caught.value)


def test_routings_are_compared_as_in_plain_loops() -> None:
    assert wrong(kernels, "cpu") == []


INTERPRET = """
import json
from megatron_ep_v2.kernels import replay_triton
from tests.helpers.replay_kernels import wrong

print(json.dumps(wrong(replay_triton, "cpu")))
"""


@pytest.mark.slow
@needs_triton
def test_the_kernels_do_the_same_in_tritons_interpreter() -> None:
    assert child(INTERPRET, TRITON_INTERPRET="1") == []


@isolated
def in_another_order(group: Any, layout: Layout) -> dict[str, list[torch.Tensor]]:
    """Way -> gradients of x and of dense probabilities, where each run brings its selections in other columns."""
    case, rank, found = SMALL, group.rank(), {}
    experts = own_experts(case, rank, all_experts(case))
    batch = make_batch(case, rank, weights_dtype=torch.float64)
    dense_of = torch.zeros(len(batch.x), case.experts + 1, dtype=torch.float64)
    dense_of.scatter_(1, batch.topk_idx.where(batch.topk_idx >= 0, case.experts), batch.topk_weights)
    for way in ("plain", "Megatron's", "torch's"):
        runs = itertools.count()

        def layer(x: torch.Tensor, dense: torch.Tensor, runs: Any = runs) -> torch.Tensor:
            topk_idx = batch.topk_idx.roll(next(runs), 1)
            probs = dense.gather(1, topk_idx.where(topk_idx >= 0, case.experts))
            return moe_layer(x, topk_idx, probs, experts, case.experts, group, layout)

        x, dense = batch.x.clone().requires_grad_(), dense_of.clone().requires_grad_()
        if way == "plain":
            y = layer(x, dense)
        elif way == "torch's":
            y = checkpoint(Replayed(layer), x, dense, use_reentrant=False)
        else:
            y = tensor_parallel.checkpoint(Replayed(layer), False, x, dense)
        y.backward(grad_output(case, rank))
        device_checks.read_all()
        found[way] = [x.grad, dense.grad[:, : case.experts]]
    return found


@pytest.mark.parametrize("layout", [COMPACT, EXPANDED], ids=str)
def test_gradients_find_their_columns(layout: Layout) -> None:
    for found in run_ranks(2, in_another_order, layout):
        for way in ("Megatron's", "torch's"):
            for actual, wanted in zip(found[way], found["plain"], strict=True):
                assert (actual - wanted).abs().max() < 1e-12, way
