"""Who decides that a step is not applied: all ranks of the model together, in Megatron's own optimizers, with two
expert-parallel groups of which only one has something to refuse; also where the optimizer's step is replayed from a
CUDA graph; and what loops of one's own do."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import megatron_ep_v2
from megatron_ep_v2 import device_checks, settings, sync_free
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import EPError, GroupMismatchError, LayoutOverflowError, PeerError, RoutingChangedError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.megatron import symbols
from megatron_ep_v2.recompute import Replayed
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.megatron_layer import build_layer, hidden_states, process_groups, step
from tests.helpers.megatron_training import Job, Setup, on_cpu
from tests.helpers.moe_features import WHOLE_LAYER
from tests.helpers.shapes import CPU, Split

GRAPH_WRAPPER = importlib.util.find_spec(symbols.GRAPHED_STEP)


def routers(job: Job) -> list[torch.nn.Parameter]:
    return [p for name, p in job.model.named_parameters() if "router.weight" in name]


def change_routing_in_one_group(world: Any, distributed: bool) -> dict[str, Any]:
    """Rank 3's routers change between the forward and its recompute, in the second step."""
    with on_cpu(), process_groups(Split(1, 2)):
        job = Job(Setup(distributed=distributed, more=tuple(WHOLE_LAYER.items())))
        job.step()
        before = job.weights()
        kept = [p.detach().clone() for p in routers(job)]

        def negate(*_: Any) -> None:
            for p in routers(job) if world.rank() == 3 else []:
                p.data.neg_()

        hook = job.ddp.register_forward_hook(negate)
        found: dict[str, Any] = {"said": ""}
        try:
            job.step(1)
        except EPError as error:
            found["said"] = f"{type(error).__name__}: {error}"
        hook.remove()
        for p, value in zip(routers(job), kept, strict=True):
            p.data.copy_(value)
        found["untouched"] = all(torch.equal(value, before[name]) for name, value in job.weights().items())
        found["norm"] = job.step()[1]
        found["moved"] = any(not torch.equal(value, before[name]) for name, value in job.weights().items())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True])
def test_a_routing_changed_in_one_group_stops_every_rank(distributed: bool) -> None:
    ranks = run_ranks(4, change_routing_in_one_group, distributed)
    for rank, found in enumerate(ranks):
        assert found["said"].startswith("RoutingChangedError: ")
        assert ("on rank(s) [1] of the group" if rank > 1 else "another expert-parallel group") in found["said"]
        assert found["untouched"] and found["moved"]
        assert found["norm"] == ranks[0]["norm"]


def overflow_in_one_group(world: Any, percent: int) -> tuple[list[float], int, dict[str, torch.Tensor]]:
    """Steps with room for `percent` of an even share, where the second group's tokens all go to three experts: losses,
    how often a step was repeated, weights."""
    with (
        mock.patch.dict("os.environ", MCORE_DEEPEP_V2_SYNC_FREE_ROWS_PERCENT=str(percent)),
        on_cpu(),
        process_groups(Split(1, 2)),
    ):
        job = Job(Setup(experts="grouped"))
        if world.rank() > 1:
            job.ddp.register_forward_pre_hook(lambda *_: [p.data.zero_() for p in routers(job)] and None)
        losses, repeats = [], 0
        while len(losses) < 2:
            try:
                losses.append(job.step()[0])
            except LayoutOverflowError:
                repeats += 1
                sync_free.grow()
        return losses, repeats, job.weights()


@pytest.mark.slow
def test_an_overflow_in_one_group_repeats_the_step_on_every_rank() -> None:
    env = {"MCORE_DEEPEP_V2_SYNC_FREE": "1"}
    wanted = run_ranks(4, overflow_in_one_group, 0, env=env)
    for (losses, repeats, weights), (wanted_losses, none, wanted_weights) in zip(
        run_ranks(4, overflow_in_one_group, 190, env=env), wanted, strict=True
    ):
        assert repeats == 1 and none == 0
        assert losses == wanted_losses
        assert all(torch.equal(weights[name], wanted_weights[name]) for name in wanted_weights)


class Graph:
    """Stands for a CUDA graph of SGD's step: a replay updates the parameters and runs no Python of the optimizer's."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters = parameters

    def replay(self) -> None:
        for p in self.parameters:
            if p.grad is not None:
                p.data.sub_(p.grad)


@contextlib.contextmanager
def graphs(parameters: list[torch.nn.Parameter]) -> Iterator[list[bool]]:
    """CUDA as far as a wrapper around an optimizer's step asks for it. Yields whether a capture is under way."""
    capturing: list[bool] = []

    @contextlib.contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        capturing.append(True)
        yield
        capturing.pop()

    with (
        mock.patch.multiple(torch.cuda, CUDAGraph=lambda: Graph(parameters), graph=graph, synchronize=lambda: None),
        mock.patch.multiple(torch.cuda, is_current_stream_capturing=lambda: bool(capturing), is_available=lambda: True),
    ):
        yield capturing


def replay_steps(group: Any) -> list[tuple[str, bool]]:
    """--optimizer-cuda-graph: an ordinary step, the capture, and replays, of which the second has an overflow: what
    each said, and whether it changed the weights."""
    module = importlib.import_module(symbols.GRAPHED_STEP)
    with process_groups():
        megatron_ep_v2.install(
            buffer="reference", num_max_tokens_per_rank=CPU.tokens, sync_free=True, sync_free_rows_percent=60
        )
        layer = build_layer(CPU, "flex", "grouped")
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        with (
            mock.patch.multiple(module, get_shared_capture_stream=lambda: None, get_graph_pool=lambda *_: None),
            graphs(list(layer.parameters())),
        ):
            wrapper = module.OptimizerCudaGraphWrapper(optimizer.step, cuda_graph_warmup_steps=1)
            found = []
            for tokens in (4, 4, 4, CPU.tokens, 4):
                with mock.patch.object(torch.cuda, "is_available", lambda: False):
                    step(layer, hidden_states(CPU, tokens, 1))
                before, said = layer.experts.linear_fc1.weight.detach().clone(), ""
                try:
                    wrapper()
                except EPError as error:
                    said = type(error).__name__
                found.append((said, not torch.equal(before, layer.experts.linear_fc1.weight)))
    return found


@pytest.mark.skipif(GRAPH_WRAPPER is None, reason="this Megatron-Core has no --optimizer-cuda-graph (0.19 has)")
def test_a_replayed_step_is_refused_before_it_changes_a_weight() -> None:
    for found in run_ranks(2, replay_steps):
        assert found == [("", True), ("", True), ("", True), ("LayoutOverflowError", False), ("", True)]


def test_a_captured_step_without_a_reader_is_refused() -> None:
    check = device_checks.DeviceCheck(lambda counts: EPError(f"full: {counts}"), torch.device("cpu"))
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with graphs([weight]) as capturing:
        capturing.append(True)
        with pytest.raises(EPError, match="captured into a CUDA graph") as caught:
            optimizer.step()
        assert "read_by_caller" in str(caught.value)
        with device_checks.read_by_caller():
            optimizer.step()
    check.add(torch.tensor([True]))
    with pytest.raises(EPError, match="full"):
        optimizer.step()
    assert weight.tolist() == [0.0] * 2  # stepped once


KINDS: list[type[EPError]] = [GroupMismatchError, LayoutOverflowError, RoutingChangedError]


def decide(world: Any, kinds: list[int]) -> tuple[str, list[str]]:
    """kinds: for each rank an index into KINDS, -1 = no error. The error's class, its text and notes."""
    mine = kinds[world.rank()]
    check = device_checks.DeviceCheck(lambda _: KINDS[mine]("own"), torch.device("cpu"))
    check.add(torch.tensor([mine >= 0]))
    try:
        device_checks.read_all(dist.group.WORLD)
    except EPError as error:
        return type(error).__name__, [str(error).splitlines()[0], *getattr(error, "__notes__", [])]
    return "", []


def test_every_rank_raises_the_gravest_error() -> None:
    elsewhere = "this rank must not step, because another expert-parallel group of the job has an error"
    assert run_ranks(3, decide, [-1, -1, -1]) == [("", [])] * 3
    assert run_ranks(3, decide, [1, -1, 1]) == [
        ("LayoutOverflowError", ["own"]),
        ("LayoutOverflowError", [elsewhere]),
        ("LayoutOverflowError", ["own"]),
    ]
    assert run_ranks(3, decide, [1, 2, 0]) == [
        ("RoutingChangedError", [elsewhere, "own"]),
        ("RoutingChangedError", ["own"]),
        ("RoutingChangedError", [elsewhere, "own"]),
    ]
    assert run_ranks(3, decide, [-1, 0, -1]) == [
        (PeerError.__name__, [elsewhere]),
        (GroupMismatchError.__name__, ["own"]),
        (PeerError.__name__, [elsewhere]),
    ]


@isolated
def keep_a_loss(group: Any, destroy: bool) -> tuple[list[bool], bool, float]:
    """Rank 0 keeps the loss of a step that is given up, and with it the step's graph; the next step has new buffers:
    what waits to be read before it, whether a buffer lives on after its backward, and the new weight."""
    settings.activate(settings.resolve(buffer="reference"))
    weight = torch.nn.Parameter(torch.ones(16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    topk_idx = torch.tensor([[0, 1, 3]]).expand(6, -1).contiguous()

    def layer(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        rows, _, _, _, handle = fused_dispatch(x, topk_idx, probs, 4, group)
        return fused_combine(rows * weight, group, handle)[0]

    def loss() -> torch.Tensor:
        inputs = torch.ones(6, 16, requires_grad=True), torch.ones(6, 3, requires_grad=True)
        return checkpoint(Replayed(layer), *inputs, use_reentrant=False).sum()

    kept = loss()
    kept.backward()
    buffer = weakref.ref(pool.buffers()[0])
    if group.rank():
        del kept
    if destroy:
        pool.destroy_buffers()
    gc.collect()
    alive = buffer() is not None
    optimizer.zero_grad()
    loss().backward()
    waiting = [check.waiting for check in device_checks._live.values()]
    optimizer.step()
    return waiting, alive, float(weight[0])


@pytest.mark.parametrize("destroy", [False, True])
def test_a_loss_that_one_rank_keeps_brings_no_old_check_to_the_next_step(destroy: bool) -> None:
    """Its check would be gathered by this rank alone, with the other ranks in another collective."""
    first, second = run_ranks(2, keep_a_loss, destroy)
    assert first == second and first[1] is not destroy
    assert first[0] == [True, True], "what compares the routings, and counts near ties"
    assert first[2] == 1 - 2 * 6, "each rank got each token once"
