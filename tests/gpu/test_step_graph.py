"""Training steps replayed from one CUDA graph: losses, norms and weights are those of eager steps, through
accumulation, other micro-batches, evaluations, a checkpoint, and steps that need more rows than the graph has."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.megatron.qwen3_moe.step_graph import StepGraph
from tests.helpers.carriers import v2_carrier
from tests.helpers.compare import worst
from tests.helpers.graphed_steps import GPU_SHAPE, Place, every_kind, many
from tests.helpers.harness import isolated, run_ranks

RANKS = gpu_ranks()

pytestmark = pytest.mark.usefixtures("transformer_engine")


def here() -> Place:
    return Place(GPU_SHAPE, {"buffer": v2_carrier()}, "cuda", "bf16")


@functools.cache
def clean(graph: bool) -> list[dict[str, Any]]:
    return run_ranks(RANKS, every_kind, here(), graph, False, backend="nccl")


def test_replayed_steps_are_eager_steps_bit_for_bit() -> None:
    eager, graph = clean(False), clean(True)
    for by_graph, wanted in zip(graph, eager, strict=True):
        assert by_graph["repeated in the graph"] == wanted["repeated in the graph"] >= 1
        assert by_graph["losses"] == wanted["losses"]
        different = [
            name for name, value in wanted["weights"].items() if not torch.equal(by_graph["weights"][name], value)
        ]
        assert not different
        # As many rows as the first steps need; fitted; after an overflow; and four kinds of micro-batches.
        assert by_graph["captures"] >= 6
        assert wanted["captures"] == 0
    print(graph[0]["captures"], "captures, MiB:", [round(mib, 1) for mib in graph[0]["MiB"]])


def test_a_poisoned_tail_reaches_no_weight_of_a_replayed_step() -> None:
    poisoned = run_ranks(RANKS, every_kind, here(), True, True, backend="nccl")
    for found, wanted in zip(poisoned, clean(True), strict=True):
        assert found["losses"] == wanted["losses"]
        assert all(torch.equal(found["weights"][name], value) for name, value in wanted["weights"].items())


@isolated
def destroy(group: Any) -> bool:
    """A process group whose collective a graph holds, and the graph is kept."""
    own, device = dist.new_group(), torch.device("cuda", torch.cuda.current_device())

    def add_up(tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        result = tokens[0].clone()
        dist.all_reduce(result, group=own)
        return result

    with torch.cuda.stream(torch.cuda.Stream()):
        graph = StepGraph(add_up, device)
        results = [int(graph.run([torch.tensor(number)])) for number in range(4)]
    assert graph.captures and results == [number * group.size() for number in range(4)]
    megatron_ep_v2.destroy_buffers()
    dist.destroy_process_group(own)
    return graph._graph is None


def test_a_process_group_whose_collectives_were_captured_can_be_destroyed() -> None:
    """Once buffers are destroyed: NCCL waits for every graph that holds one of them, without an end."""
    assert all(run_ranks(RANKS, destroy, backend="nccl"))


@pytest.mark.parametrize("deterministic", [True, False])
def test_two_hundred_steps(deterministic: bool) -> None:
    eager = run_ranks(RANKS, many, here(), False, deterministic, backend="nccl")[0]
    graph = run_ranks(RANKS, many, here(), True, deterministic, backend="nccl")[0]
    if deterministic:
        assert graph == eager
        return
    # Sums come in another order in every run: bf16 rounds them by 2**-9, and training carries that on.
    again = run_ranks(RANKS, many, here(), False, deterministic, backend="nccl")[0]
    noise = worst(abs(a - b) for (a, _), (b, _) in zip(again, eager, strict=True))
    apart = worst(abs(a - b) for (a, _), (b, _) in zip(graph, eager, strict=True))
    print(f"largest difference of losses: graph and eager {apart:.4f}, two eager runs {noise:.4f}")
    assert apart < 3 * noise + 1e-3
