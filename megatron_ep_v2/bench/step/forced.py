"""A routing that gives one rank of a whole training step a chosen multiple of the mean."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_ep_v2.bench.shapes import even_scores, overloaded
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer


def force_overload(trainer: Trainer, overload: float, hot_experts: int | None = None) -> None:
    """Let the routers of a model select, in every micro-batch, so that the first rank receives `overload` times the
    mean in each layer, and all other experts are equally likely.

    The logits have the values of random numbers, which repeat in every step, and the router's own gradient: its work
    and what follows from it stay. Works in CUDA graphs, since the numbers are on the device.

    Args:
        hot_experts: See `overloaded`.
    """
    options, ranks = trainer.options, trainer.world
    tokens = options.micro_batch_size(ranks) * options.shape.seq_length
    for number, layer in enumerate(trainer.moe_layers):
        generator = torch.Generator().manual_seed((1000 * options.seed + trainer.rank) * 1000 + number)
        scores = even_scores(tokens, options.shape.num_experts, generator)
        # The smallest scores become the largest logits.
        logits = -overloaded(scores, options.shape.topk, overload, ranks, hot_experts).log()
        layer.router.gating = _forced(layer.router.gating, logits.to(trainer.device, torch.float32))


def _forced(theirs: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Megatron's gating with other values. values: [T, E]."""

    def gating(hidden: torch.Tensor) -> torch.Tensor:
        logits = theirs(hidden)
        return values.to(logits.dtype).view_as(logits) + (logits - logits.detach())

    return gating
