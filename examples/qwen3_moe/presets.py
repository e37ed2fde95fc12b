"""Shapes and recipes of Qwen3-MoE.

Every field is an option of the command line: `num_layers` is `--num-layers`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ep_v2.megatron.qwen3_moe.options import SHAPES, ModelShape, Recipe


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
        shape=SHAPES["30b-a3b"],
        recipe=Recipe(steps=1000, global_batch_size=32, micro_batch_size=1, lr=3e-4, min_lr=3e-5, warmup_steps=50),
        recompute=True,
    ),
    "235b-a22b": Preset(
        shape=SHAPES["235b-a22b"],
        recipe=Recipe(steps=1000, global_batch_size=32, micro_batch_size=1, lr=3e-4, min_lr=3e-5, warmup_steps=50),
        recompute=True,
    ),
}
