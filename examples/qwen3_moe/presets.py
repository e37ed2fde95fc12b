"""Shapes and recipes of Qwen3-MoE.

Every field is an option of the command line: `num_layers` is `--num-layers`.
"""

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


@dataclass(frozen=True, kw_only=True)
class Preset:
    shape: ModelShape
    recipe: Recipe
    recompute: bool = False  # full activation recomputation, one layer at a time (CUDA only)


PRESETS = {
    # About a minute on two CPU cores. So few steps need a stronger pull towards balanced experts than Qwen3's 1e-3.
    "tiny": Preset(
        shape=ModelShape(
            num_layers=3,
            hidden_size=256,  # DeepEP's kernels need a multiple of it
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=32,
            ffn_hidden_size=384,
            moe_ffn_hidden_size=64,
            num_experts=16,
            topk=4,
            seq_length=128,
        ),
        recipe=Recipe(steps=240, global_batch_size=16, lr=5e-3, min_lr=5e-4, warmup_steps=20, aux_loss_coeff=1e-2),
    ),
    "30b-a3b": Preset(
        shape=ModelShape(
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
        recipe=Recipe(steps=1000, global_batch_size=32, micro_batch_size=1, lr=3e-4, min_lr=3e-5, warmup_steps=50),
        recompute=True,
    ),
    "235b-a22b": Preset(
        shape=ModelShape(
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
        recipe=Recipe(steps=1000, global_batch_size=32, micro_batch_size=1, lr=3e-4, min_lr=3e-5, warmup_steps=50),
        recompute=True,
    ),
}
