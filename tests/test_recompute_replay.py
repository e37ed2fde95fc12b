"""Activation recompute: one layout for each layer and micro-batch, the same gradients, and no handle is left."""

from __future__ import annotations

import pytest
import torch

from megatron_ep_v2 import recompute
from tests.helpers.cases import COMPACT, EXPANDED, PADDED, Layout
from tests.helpers.harness import run_ranks
from tests.helpers.recompute_rounds import (
    WRAPS,
    abandon_a_step,
    change_the_routing,
    compare_layers,
    two_backwards,
    two_layers,
    without_reuse,
)
from tests.helpers.shapes import CPU


@pytest.mark.parametrize("layout", ["compact", "expanded"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_megatrons_layer_dispatches_once_and_trains_the_same(layout: str, micro_batches: int) -> None:
    for found in run_ranks(2, compare_layers, CPU, layout, micro_batches):
        assert found["calls"].count("first") == micro_batches
        assert found["calls"].count("cached") == found["calls"].count("gradient") == micro_batches
        assert found["difference"] == 0.0 < found["size"]
        assert found["alive"] == 0
        assert found["eval"] == ["first"] and found["alive after eval"] == 0


def test_a_recomputed_dispatch_is_counted_once() -> None:
    loads = [found["load"] for found in run_ranks(2, compare_layers, CPU, "expanded", 2)]
    assert loads == [2 * 2 * CPU.tokens * CPU.topk] * 2


def test_the_reuse_can_be_turned_off() -> None:
    for calls in run_ranks(2, without_reuse, CPU):
        assert calls == ["first", "first", "gradient"]


def test_a_changed_routing_is_refused_on_every_rank() -> None:
    for said in run_ranks(2, change_the_routing, CPU):
        assert said.startswith("RoutingChangedError: the recomputed forward chose other experts")
        assert "on rank(s) [1]" in said and "REUSE_RECOMPUTE_HANDLE=off" in said


def test_an_abandoned_step_leaves_nothing_for_the_next() -> None:
    for found in run_ranks(2, abandon_a_step, CPU):
        assert found == {"kept": 1, "left": 0, "calls": ["first", "cached", "gradient"], "difference": 0.0}


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
