"""Steps that overflow on one stage of a pipeline run again on all stages, in Megatron's 1F1B schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule

import megatron_ep_v2
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import hidden_states, moe_layer_of, set_weights, transformer_config
from tests.helpers.megatron_training import on_cpu
from tests.helpers.shapes import CPU, Split
from tests.megatron.test_forward_backward import SYNC_FREE, assert_equal, room_for

TOKENS, MICRO_BATCHES = (8, 2), 4


class Stage(MegatronModule):
    """One MoE layer."""

    def __init__(self, config: Any):
        from megatron_ep_v2.megatron.experts import EXPERTS

        super().__init__(config)
        self.layer = moe_layer_of(config, experts=EXPERTS["grouped"])
        set_weights(self.layer)
        # For Megatron's schedule, and because it reduces the gradients of embeddings that stages share.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = parallel_state.is_pipeline_first_stage()
        self.post_process = not self.pre_process
        self.share_embeddings_and_output_weights = False
        self.input: torch.Tensor | None = None
        self.forwards = 0

    def set_input_tensor(self, received: list[torch.Tensor | None]) -> None:
        self.input = received[0]

    def forward(self, x: torch.Tensor | None) -> torch.Tensor:
        self.forwards += 1
        x = x if self.input is None else self.input
        assert x is not None
        return x + self.layer(x)[0]


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    y = model(next(data_iterator) if data_iterator is not None else None)
    return y, lambda y: (y.square().mean(), {"loss": y.detach().square().mean()})


def train(world: Any, percent: int) -> tuple[dict[str, Any], int]:
    """Losses and gradients of a step whose second stage has more rows than room; how often each micro-batch ran."""
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2, expert_model_parallel_size=2)
    try:
        with room_for(percent), on_cpu():
            last = parallel_state.is_pipeline_last_stage()
            megatron_ep_v2.install(buffer="reference", experts="grouped")
            config = transformer_config(CPU, Split(1, 2), pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
            stage = Stage(config)
            if last:
                stage.layer.router.weight.data.zero_()
            ddp = DistributedDataParallel(config, DistributedDataParallelConfig(overlap_grad_reduce=True), stage)
            config.finalize_model_grads_func, config.no_sync_func = finalize_model_grads, ddp.no_sync
            items = iter([hidden_states(CPU, *TOKENS, seed=n) for n in range(MICRO_BATCHES)])
            losses = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=None if last else items,
                model=ddp,
                num_microbatches=MICRO_BATCHES,
                seq_length=TOKENS[0],
                micro_batch_size=TOKENS[1],
                forward_only=False,
            )
            gradients = {name: p.main_grad.clone() for name, p in stage.named_parameters()}
            found = {"losses": [loss["loss"] for loss in losses], "gradients": gradients, "left": len(list(items))}
            return found, stage.forwards // MICRO_BATCHES
    finally:
        megatron_ep_v2.uninstall()
        parallel_state.destroy_model_parallel()


@pytest.mark.slow
def test_every_stage_repeats_the_step() -> None:
    wanted = run_ranks(4, train, 0, env=SYNC_FREE)
    for rank, ((found, runs), (unlimited, once)) in enumerate(
        zip(run_ranks(4, train, 150, env=SYNC_FREE), wanted, strict=True)
    ):
        assert (runs, once) == (2, 1)
        assert len(found["losses"]) == (MICRO_BATCHES if rank > 1 else 0)
        assert_equal(found, unlimited, f"rank {rank}")
