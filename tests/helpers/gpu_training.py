"""A training job on GPUs of Megatron's own parts, as megatron.training sets it up: the example's model in bf16,
DistributedDataParallel, the distributed optimizer, a schedule."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ep_v2.megatron.qwen3_moe import model as example
from megatron_ep_v2.megatron.qwen3_moe.options import ModelShape, TrainerOptions
from tests.helpers.graphed_steps import recipe


class Job:
    """A model in training on this rank. Call `install()` before.

    Args:
        fields: Of the model's configuration.
        micro_batches: Of a step, one sequence each.
        stream: In which DistributedDataParallel is built, where gradients then end; None = the current one.

    Attributes:
        run: Megatron's schedule, or a wrapper of it.
    """

    def __init__(
        self,
        shape: ModelShape,
        fields: dict[str, Any],
        rank: int,
        size: int,
        micro_batches: int,
        stream: torch.cuda.Stream | None = None,
    ):
        self.shape, self.rank, self.micro_batches = shape, rank, micro_batches
        self.device = torch.device("cuda", torch.cuda.current_device())
        options = TrainerOptions(shape=shape, recipe=recipe(size), dtype="bf16", experts="grouped")
        theirs = example.transformer_config
        with mock.patch.object(example, "transformer_config", lambda *args: replace(theirs(*args), **fields)):
            self.model = example.build_model(options, self.device, rank, size)
        self.config = self.model.config
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            self.ddp = DistributedDataParallel(
                self.config,
                DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
                self.model,
            )
        if stream is not None:
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
        self.run = get_forward_backward_func()

    def step(self, number: int) -> tuple[list[torch.Tensor], float]:
        """This rank's losses and the gradient norm."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.run(
            forward_step_func=forward_step,
            data_iterator=iter([self.micro_batch(number, i) for i in range(self.micro_batches)]),
            model=[self.ddp],
            num_microbatches=self.micro_batches,
            seq_length=self.shape.seq_length,
            micro_batch_size=1,
            forward_only=False,
        )
        good, norm, _ = self.optimizer.step()
        assert good
        return [loss["loss"].clone() for loss in losses], float(norm)

    def micro_batch(self, step: int, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * step + 10 * i + self.rank)
        return {"tokens": torch.randint(256, (1, self.shape.seq_length + 1), generator=generator).to(self.device)}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu() for name, value in self.model.named_parameters()}


def forward_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """As Megatron-LM's pretrain_gpt.py has it."""
    tokens = next(data_iterator)["tokens"]
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device)[None]
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(tokens[:, :-1], positions, attention_mask=None, labels=tokens[:, 1:].contiguous())
    return output, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})
