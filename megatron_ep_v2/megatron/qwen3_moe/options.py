"""What a Qwen3-MoE and a training step of it depend on: sizes, recipe, and how it is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _option(help: str, **default: Any) -> Any:
    return field(metadata={"help": help}, **default)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What fixes the shape of every parameter, and the sequence length."""

    num_layers: int = _option("transformer layers, each with experts")
    hidden_size: int = _option("width of the residual stream")
    num_attention_heads: int = _option("query heads")
    num_query_groups: int = _option("key/value heads")
    kv_channels: int = _option("width of one attention head")
    ffn_hidden_size: int = _option("width of a dense feed-forward layer (Qwen3-MoE has none)")
    moe_ffn_hidden_size: int = _option("width of one expert")
    num_experts: int = _option("experts of a layer, over all ranks")
    topk: int = _option("experts that a token is sent to")
    seq_length: int = _option("tokens of one sequence")
    vocab_size: int = _option("rows of the embedding; 256 = bytes", default=256)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the model is trained."""

    steps: int = _option("optimiser steps")
    global_batch_size: int = _option("sequences of one step, over all ranks")
    micro_batch_size: int = _option("sequences of one forward pass on a rank; 0 = the rank's whole share", default=0)
    lr: float = _option("highest learning rate")
    min_lr: float = _option("learning rate at the end of the cosine")
    warmup_steps: int = _option("steps of linear warm-up")
    weight_decay: float = _option("of matrices; norms have none", default=0.1)
    adam_beta1: float = _option("AdamW's first beta", default=0.9)
    adam_beta2: float = _option("AdamW's second beta", default=0.95)
    grad_clip: float = _option("largest global gradient norm; 0 = off", default=1.0)
    aux_loss_coeff: float = _option("weight of the load-balancing loss", default=1e-3)


SHAPES = {
    "30b-a3b": ModelShape(
        num_layers=48,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=4,
        kv_channels=128,
        ffn_hidden_size=6144,
        moe_ffn_hidden_size=768,
        num_experts=128,
        topk=8,
        seq_length=4096,
    ),
    "235b-a22b": ModelShape(
        num_layers=94,
        hidden_size=4096,
        num_attention_heads=64,
        num_query_groups=4,
        kv_channels=128,
        ffn_hidden_size=12288,
        moe_ffn_hidden_size=1536,
        num_experts=128,
        topk=8,
        seq_length=4096,
    ),
}


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """What the model and a step of it depend on.

    Attributes:
        shape: Sizes of the model.
        recipe: Batch sizes, learning rate, optimizer.
        recompute: Full activation recomputation, one layer at a time (CUDA only).
        dispatcher: Megatron's `moe_token_dispatcher_type`.
        dtype: "fp32", "bf16", or "auto": bf16 on GPUs; on the CPU fp32 with rows to and from experts in bf16.
        seed: Of the weights.
        permute_fusion: Megatron's `moe_permute_fusion` (CUDA only).
        experts: "megatron", or a key of `megatron_ep_v2.megatron.experts.EXPERTS`.
        cuda_graph: Forward, backward and reduction of a step in one CUDA graph (CUDA and sync-free mode only).
        shared_expert_ffn: Width of a layer's shared experts, together; 0 = none, as Qwen3.
        shared_expert_overlap: Megatron's `moe_shared_expert_overlap` (CUDA; up to 0.18 with alltoall only).
    """

    shape: ModelShape
    recipe: Recipe
    recompute: bool = False
    dispatcher: str = "flex"
    dtype: str = "auto"
    seed: int = 1234
    permute_fusion: bool = False
    experts: str = "megatron"
    cuda_graph: bool = False
    shared_expert_ffn: int = 0
    shared_expert_overlap: bool = False

    def micro_batch_size(self, world: int) -> int:
        """Sequences of one forward pass on one of `world` ranks."""
        return self.recipe.micro_batch_size or max(1, self.recipe.global_batch_size // world)

    def num_micro_batches(self, world: int) -> int:
        """Forward passes of one step on each of `world` ranks."""
        return self.recipe.global_batch_size // (self.micro_batch_size(world) * world)
