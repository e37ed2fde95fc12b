"""Memory where Megatron runs a layer on two streams, in its 1F1B plan and with the shared expert next to communication:
none that this package makes or uses may be handed out again before both are done with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from qwen3_moe.options import Options
from torch.utils._pytree import tree_map_only

from megatron_ep_v2 import streams
from megatron_ep_v2.buffers.pending import Pending, Starter
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.device_checks import read_all
from megatron_ep_v2.experts.counts import row_info
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.megatron.experts import Experts
from megatron_ep_v2.megatron.qwen3_moe.model import build_model
from megatron_ep_v2.megatron.stacked_linear import StackedLinear
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import hidden_states, installed, make_layer, process_groups, step
from tests.helpers.moe_features import SHARED
from tests.helpers.shapes import CPU, Split
from tests.helpers.shared_expert import shared_expert_on_the_cpu, with_overlap
from tests.helpers.stream_memory import StreamMemory
from tests.megatron.test_overlap import (
    MICRO_BATCHES,
    RANKS,
    RECIPE,
    SHAPE,
    TOKENS,
    micro_batches,
    plan_on_the_cpu,
    planned,
)


class LikeDeepEp(Starter, ReferenceBuffer):
    """With the memory of DeepEP 2.5: the handle keeps the caller's selections, every call reads all of its handle, and
    what arrives by a started call is copied from the buffer when that is finished."""

    keeps_topk_idx = True

    def dispatch(self, x: Any, **arguments: Any) -> Any:
        self._finish_started()
        arrived = super().dispatch(x, **arguments)
        if arguments.get("handle") is None:
            vars(arrived[3])["topk_idx"] = arguments["topk_idx"]
        read(arrived[3])
        return arrived

    def combine(self, x: Any, handle: Any, *more: Any, **arguments: Any) -> Any:
        self._finish_started()
        read(handle)
        return super().combine(x, handle, *more, **arguments)

    def start_dispatch(self, x: Any, **arguments: Any) -> Pending[Any]:
        rows, selections, weights, handle, event = self.dispatch(x, **arguments)
        arrive = self._keep(rows, weights, None if arguments.get("handle") else handle.recv_src_metadata)

        def finish() -> Any:
            read(handle)
            rows, weights, sources = arrive()
            if sources is not None:
                vars(handle)["recv_src_metadata"] = sources
            return rows, selections, weights, handle, event

        return self._start(finish)

    def start_combine(self, x: Any, handle: Any, *more: Any, **arguments: Any) -> Pending[Any]:
        *sums, event = self.combine(x, handle, *more, **arguments)
        arrive = self._keep(*sums)
        return self._start(lambda: (*arrive(), event))

    def _keep(self, *arrived: Any) -> Callable[[], Any]:
        """In memory of the buffer, which is not handed out. Returns what copies it from there."""
        vars(self).setdefault("own", []).append(arrived)
        return lambda: tree_map_only(torch.Tensor, torch.clone, arrived)


def read(handle: Any) -> None:
    for each in vars(handle).values():
        if isinstance(each, torch.Tensor):
            each.clone()


def groups_on_device(tokens_per_expert: torch.Tensor, rows: torch.Tensor) -> Groups:
    """What `Groups.from_counts` makes on a GPU."""
    info = row_info(tokens_per_expert)
    assert info.ends is not None
    return Groups(ends=info.ends, sizes=None, alignment=info.alignment, used=info.ends[-1], num_rows=len(rows))


def in_plan(group: Any, layout: str, experts: str, started: bool, delay: bool, recorded: bool = True) -> list[str]:
    """Hazards of memory that this package has made or used.

    Args:
        recorded: False = this package records no stream.
    """
    mode: dict[str, Any] = {"sync_free": True} if layout == "sync-free" else {"layout": layout}
    options = Options(shape=SHAPE, recipe=RECIPE, dtype="fp32", experts=experts)
    batches, grad = micro_batches(group.rank()), torch.full((1, TOKENS), 1 / (MICRO_BATCHES * TOKENS))
    with (
        mock.patch("megatron_ep_v2.buffers.reference.ReferenceBuffer", LikeDeepEp),
        mock.patch.object(LikeDeepEp, "defers", started),
        # Of modules without one, as linears are in 0.16 where TransformerEngine is not installed.
        mock.patch.object(torch.nn.Module, "backward_dw", lambda _: None, create=True),
        installed(Split(1, RANKS), num_max_tokens_per_rank=TOKENS, **mode),
    ):
        model = build_model(options, torch.device("cpu"), group.rank(), RANKS)
        for module in model.modules():
            if isinstance(module, MoELayer):
                module.config.overlap_moe_expert_parallel_comm = True
                module.config.delay_wgrad_compute = delay
            if isinstance(module, StackedLinear):
                module._delays = delay
            if isinstance(module, Experts):
                module.recompute_activation = True  # so that delayed weight gradients read the probabilities, too
        with plan_on_the_cpu(), StreamMemory() as memory:
            if layout == "sync-free":
                memory.patch.setattr(Groups, "from_counts", groups_on_device)
            if not recorded:
                memory.patch.setattr(streams, "record", lambda *_: None)
            planned(model, batches, grad)
        read_all()
        return memory.ours


@pytest.mark.slow
@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize(
    ("layout", "experts", "started"),
    [
        ("compact", "grouped", False),
        ("expanded", "grouped", False),
        ("expanded", "sequential", False),
        ("expanded", "grouped", True),
        ("sync-free", "grouped", False),
    ],
)
def test_the_plan_hands_out_no_memory_too_early(layout: str, experts: str, started: bool, delay: bool) -> None:
    assert run_ranks(RANKS, in_plan, layout, experts, started, delay) == [[], []]


@pytest.mark.parametrize("started", [False, True])
def test_without_record_stream_it_would(started: bool) -> None:
    """The control. The last call of a micro-batch reads selections of the compute stream; with calls that wait, delayed
    weight gradients read rows of the communication stream; with started ones the next calls read what is finished on
    the compute stream."""
    for ours in run_ranks(RANKS, in_plan, "expanded", "grouped", started, True, False):
        owners = [each.partition(" may be overwritten")[0] for each in ours]
        assert any("topk.py" in each and "on compute" in each for each in owners), ours
        assert any("on communication" in each for each in owners), ours


def next_to_shared_expert(group: Any, layout: str, started: bool, waits: bool = True) -> list[str]:
    """Hazards of two steps.

    Args:
        waits: False = the shared expert's stream does not wait for the current one before it begins.
    """
    with (
        mock.patch("megatron_ep_v2.buffers.reference.ReferenceBuffer", LikeDeepEp),
        mock.patch.object(LikeDeepEp, "defers", started),
        process_groups(),
        shared_expert_on_the_cpu(),
        pytest.MonkeyPatch.context() as patch,
    ):
        layer = make_layer(CPU, "flex", layout, "grouped", **SHARED, moe_shared_expert_overlap=True)
        if not waits:
            patch.setattr(SharedExpertMLP, "wait_current_stream", lambda _: None)
        # On reuse: Megatron drops the shared expert's output unrecorded, and its stream waits before it makes another.
        with StreamMemory(on_reuse=True) as memory:
            for _ in range(2):
                step(layer, hidden_states(CPU, CPU.tokens, 1), micro_batches=2)
        read_all()
        return memory.ours


@with_overlap
@pytest.mark.parametrize(("layout", "started"), [("expanded", False), ("expanded", True), ("sync-free", False)])
def test_the_shared_experts_stream_is_handed_no_memory_too_early(layout: str, started: bool) -> None:
    assert run_ranks(2, next_to_shared_expert, layout, started) == [[], []]


@with_overlap
def test_without_its_wait_it_would_be() -> None:
    """The control."""
    for ours in run_ranks(2, next_to_shared_expert, "expanded", True, False):
        assert any("on shared at" in each and "before add_ on compute" in each for each in ours), ours
