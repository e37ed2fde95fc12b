"""Megatron's CUDA graph of a whole forward and backward, on GPUs: its own wrapper, schedule, DistributedDataParallel
and distributed optimizer. Replayed steps are eager steps bit for bit, those that overflow and run again included."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import full_cuda_graph
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.moe.router import TopKRouter

import megatron_ep_v2
from megatron_ep_v2.gpus import gpu_ranks
from tests.helpers.carriers import v2_carrier
from tests.helpers.gpu_training import Job
from tests.helpers.graphed_steps import GPU_SHAPE, for_ranks
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.progress import say
from tests.helpers.reports import log_records

RANKS = gpu_ranks()
SHAPE = for_ranks(GPU_SHAPE, RANKS)
TOKENS = SHAPE.seq_length
MICRO_BATCHES, WARM_UP = 2, 3
# In these steps all tokens go to the experts of rank 0: more rows than its graph has.
SKEWED = {8, 9, 16}
STEPS = 24

pytestmark = [
    pytest.mark.usefixtures("transformer_engine"),
    pytest.mark.skipif(
        not hasattr(full_cuda_graph, "get_shared_capture_stream"), reason="written for the graphs of megatron-core 0.19"
    ),
]


BIAS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,  # the test sets it
}
WHOLE_STEP = {"cuda_graph_impl": "full_iteration"}
PARTS = {
    "cuda_graph_impl": "transformer_engine",
    "cuda_graph_modules": ["attn", "moe_router", "moe_preprocess"],
    "cuda_graph_warmup_steps": WARM_UP,
}


class GraphedJob(Job):
    """With Megatron's graphs.

    Args:
        fields: WHOLE_STEP, PARTS, or nothing, of the model's configuration.
    """

    def __init__(self, fields: dict[str, Any], rank: int, size: int):
        # Where Megatron builds it, so that gradients end in the stream of the capture.
        stream = full_cuda_graph.get_shared_capture_stream()
        super().__init__(SHAPE, BIAS | fields, rank, size, MICRO_BATCHES, stream)
        self.routers = [module for module in self.model.modules() if isinstance(module, TopKRouter)]
        if fields == WHOLE_STEP:
            self.run = full_cuda_graph.FullCudaGraphWrapper(self.run, cuda_graph_warmup_steps=WARM_UP)
        self.parts = (
            TECudaGraphHelper([self.ddp], self.config, TOKENS, 1, [self.optimizer]) if fields == PARTS else None
        )

    def step(self, number: int) -> tuple[list[torch.Tensor], float]:
        if self.parts is not None and number == WARM_UP:
            self.parts.create_cudagraphs()
        for router in self.routers:
            router.expert_bias[: SHAPE.topk] = 10.0 if number in SKEWED else 0.0
        return super().step(number)


@contextlib.contextmanager
def counted_replays() -> Iterator[list[torch.cuda.CUDAGraph]]:
    """The graph of each replay."""
    replayed: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def counting(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        replay(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", counting):
        yield replayed


@contextlib.contextmanager
def micro_batches(group: Any) -> Iterator[None]:
    """Their number, where Megatron's graphs of parts ask for it."""
    size, rank = group.size(), group.rank()
    init_num_microbatches_calculator(rank, None, size * MICRO_BATCHES, micro_batch_size=1, data_parallel_size=size)
    try:
        yield
    finally:
        destroy_num_microbatches_calculator()


@isolated
def train(group: Any, fields: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """STEPS steps with settings of `install()`."""
    with process_groups(), micro_batches(group), log_records() as records, counted_replays() as replayed:
        megatron_ep_v2.install(
            buffer=v2_carrier(), num_max_tokens_per_rank=TOKENS, experts="grouped", deterministic=True, **chosen
        )
        model_parallel_cuda_manual_seed(1, te_rng_tracker=True, force_reset_rng=True)  # whose states a graph can hold
        job = GraphedJob(fields, group.rank(), group.size())
        losses, norms = [], []
        for number in range(STEPS):
            loss, norm = job.step(number)
            losses.append([value.item() for value in loss])
            norms.append(norm)
            if number % 8 == 0:
                say(f"{fields.get('cuda_graph_impl')}, {chosen}: step {number}", group)
        found = {
            "losses": losses,
            "norms": norms,
            "weights": job.weights(),
            "replays": len(replayed),
            "captures": len(set(map(id, replayed))),
            "repeats": sum("runs again" in r.getMessage() for r in records if r.levelno == logging.WARNING),
        }
        if fields == WHOLE_STEP:
            job.run.reset_cuda_graph()
        if job.parts is not None:
            job.parts.delete_cuda_graphs()
        megatron_ep_v2.destroy_buffers()
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return found


@functools.cache
def whole_step() -> list[dict[str, Any]]:
    chosen = {"sync_free": True, "sync_free_rows_percent": 150}
    return run_ranks(RANKS, train, WHOLE_STEP, chosen, backend="nccl")


def assert_equal(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for graph, eager in zip(found, wanted, strict=True):
        assert eager["replays"] == 0 < graph["replays"]
        assert graph["losses"] == eager["losses"]
        assert graph["norms"] == eager["norms"]
        different = [name for name, value in eager["weights"].items() if not torch.equal(graph["weights"][name], value)]
        assert not different


def test_replayed_steps_are_eager_steps_bit_for_bit() -> None:
    roomy = {"sync_free": True, "sync_free_rows_percent": 0}
    assert_equal(whole_step(), run_ranks(RANKS, train, {}, roomy, backend="nccl"))


def test_a_replay_that_overflows_runs_again_and_is_captured_again() -> None:
    found = whole_step()
    assert found[0]["repeats"] >= 1, "the log of rank 0 says so"
    for graph in found:
        assert graph["captures"] >= 2
        assert graph["replays"] >= STEPS - graph["captures"] * (WARM_UP + 1) - 2


def test_graphs_of_a_part_of_each_layer() -> None:
    """Attention, router and preprocessing by TransformerEngine; dispatch, experts and combine outside. Not in the
    compact layout: without torch's deterministic mode Megatron adds a token's rows up by `scatter_add_`."""
    chosen = {"layout": "expanded"}
    graphs, eager = (run_ranks(RANKS, train, fields, chosen, backend="nccl") for fields in (PARTS, {}))
    assert_equal(graphs, eager)
