"""Megatron's CUDA graph of a whole forward and backward, on GPUs: its own wrapper, schedule, DistributedDataParallel
and distributed optimizer. Replayed steps are eager steps bit for bit, those that overflow and run again included."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import full_cuda_graph
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.moe.router import TopKRouter

import megatron_ep_v2
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.megatron.qwen3_moe import model as example
from megatron_ep_v2.megatron.qwen3_moe.options import TrainerOptions
from tests.helpers.carriers import v2_carrier
from tests.helpers.graphed_steps import GPU_SHAPE, for_ranks, recipe
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


class Job:
    """A model in training as megatron.training sets it up.

    Args:
        fields: WHOLE_STEP, PARTS, or nothing, of the model's configuration.
    """

    def __init__(self, fields: dict[str, Any], rank: int, size: int):
        device = torch.device("cuda", torch.cuda.current_device())
        options = TrainerOptions(shape=SHAPE, recipe=recipe(RANKS), dtype="bf16", experts="grouped")
        theirs = example.transformer_config
        with mock.patch.object(
            example,
            "transformer_config",
            lambda *args: replace(theirs(*args), **BIAS, **fields),
        ):
            model = example.build_model(options, device, rank, size)
        self.rank, self.model, self.config = rank, model, model.config
        self.routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        # Where Megatron builds it, so that gradients end in the stream of the capture.
        stream = full_cuda_graph.get_shared_capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.ddp = DistributedDataParallel(
                model.config,
                DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
                model,
            )
        torch.cuda.current_stream().wait_stream(stream)
        self.config.finalize_model_grads_func, self.config.no_sync_func = finalize_model_grads, self.ddp.no_sync
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            weight_decay=0.01,
            clip_grad=0.5,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
        )
        self.optimizer = get_megatron_optimizer(optimizer, [self.ddp])
        schedule = get_forward_backward_func()
        wrapper = full_cuda_graph.FullCudaGraphWrapper
        self.run = wrapper(schedule, cuda_graph_warmup_steps=WARM_UP) if fields == WHOLE_STEP else schedule
        self.parts = (
            TECudaGraphHelper([self.ddp], self.config, TOKENS, 1, [self.optimizer]) if fields == PARTS else None
        )

    def step(self, number: int) -> tuple[list[torch.Tensor], float]:
        """This rank's losses and the gradient norm."""
        if self.parts is not None and number == WARM_UP:
            self.parts.create_cudagraphs()
        for router in self.routers:
            router.expert_bias[: SHAPE.topk] = 10.0 if number in SKEWED else 0.0
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.run(
            forward_step_func=forward_step,
            data_iterator=iter([self.micro_batch(number, i) for i in range(MICRO_BATCHES)]),
            model=[self.ddp],
            num_microbatches=MICRO_BATCHES,
            seq_length=TOKENS,
            micro_batch_size=1,
            forward_only=False,
        )
        good, norm, _ = self.optimizer.step()
        assert good
        return [loss["loss"].clone() for loss in losses], float(norm)

    def micro_batch(self, step: int, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * step + 10 * i + self.rank)
        return {"tokens": torch.randint(256, (1, TOKENS + 1), generator=generator).cuda()}


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(data_iterator)["tokens"]
    positions = torch.arange(TOKENS, device="cuda")[None]
    losses = model(tokens[:, :-1], positions, attention_mask=None, labels=tokens[:, 1:].contiguous())
    return losses, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})


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
        job = Job(fields, group.rank(), group.size())
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
            "weights": {name: value.detach().cpu() for name, value in job.model.named_parameters()},
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
