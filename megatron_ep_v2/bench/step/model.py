"""The model whose steps are timed, and the work that a step of it is."""

from __future__ import annotations

import dataclasses

from megatron_ep_v2.bench.shapes import Shape
from megatron_ep_v2.megatron.qwen3_moe.options import SHAPES, ModelShape, Recipe, TrainerOptions

FORMULA = (
    "3 x forward; forward per token = 2 x (active matrix parameters: attention, router, top-k experts, shared experts, "
    "output head) + 2 x sequence length x heads x channels a layer (causal attention)"
)


def model_options(
    shape: Shape,
    *,
    layers: int,
    tokens: int,
    vocab_size: int,
    micro_batches: int,
    dtype: str,
    recompute: bool,
    ranks: int,
    seed: int,
    experts: str,
    overlap: bool = False,
) -> TrainerOptions:
    """The model of a preset of the bench: one sequence of `tokens` per rank and micro-batch.

    Qwen3's presets are its own. The others keep their MoE layer, with Qwen3's kind of attention: heads of 128
    channels, eight key/value heads at most. The learning rate is 0, so that the work stays the same.

    Args:
        overlap: Shared experts that can run next to communication (`moe_shared_expert_overlap`).
    """
    own = SHAPES.get(shape.name.removeprefix("qwen3-"))
    heads = max(1, shape.hidden // 128)
    model = own or ModelShape(
        num_layers=layers,
        hidden_size=shape.hidden,
        num_attention_heads=heads,
        num_query_groups=8 if heads % 8 == 0 else heads,
        kv_channels=128,
        ffn_hidden_size=4 * shape.hidden,
        moe_ffn_hidden_size=shape.expert_ffn,
        num_experts=shape.experts,
        topk=shape.topk,
        seq_length=tokens,
    )
    model = dataclasses.replace(
        model,
        num_layers=layers,
        num_experts=shape.experts,
        topk=shape.topk,
        seq_length=tokens,
        vocab_size=vocab_size,
    )
    recipe = Recipe(
        steps=1000,
        global_batch_size=ranks * micro_batches,
        micro_batch_size=1,
        lr=0.0,
        min_lr=0.0,
        warmup_steps=0,
        weight_decay=0.0,
    )
    return TrainerOptions(
        shape=model,
        recipe=recipe,
        recompute=recompute,
        # Of the model as it is built, where it needs least; the variants bring their own.
        dispatcher="alltoall" if overlap else "allgather",
        experts=experts,
        dtype=dtype,
        seed=seed,
        shared_expert_ffn=shape.shared_ffn,
        shared_expert_overlap=overlap,
    )


def with_layers(options: TrainerOptions, layers: int) -> TrainerOptions:
    """The same with another depth."""
    return dataclasses.replace(options, shape=dataclasses.replace(options.shape, num_layers=layers))


def layers_that_fit(model: ModelShape, shared_ffn: int, ranks: int, parameters: int) -> int:
    """Layers whose matrix parameters (the dense ones, and a rank's share of the experts) stay below a number."""
    expert = 3 * model.hidden_size * model.moe_ffn_hidden_size
    per_layer = _dense(model, shared_ffn) + expert * model.num_experts // ranks
    return max(1, (parameters - 2 * model.vocab_size * model.hidden_size) // per_layer)


def step_flops(model: ModelShape, shared_ffn: int, tokens: int) -> int:
    """Floating-point operations of a forward and backward over `tokens` tokens; see `FORMULA`.

    Args:
        shared_ffn: Width of a layer's shared experts, together.
    """
    expert = 3 * model.hidden_size * model.moe_ffn_hidden_size
    per_layer = _dense(model, shared_ffn) + model.topk * expert
    matrices = model.num_layers * per_layer + model.vocab_size * model.hidden_size
    scores = model.num_layers * 2 * model.seq_length * model.num_attention_heads * model.kv_channels
    return 3 * tokens * (2 * matrices + scores)


def _dense(model: ModelShape, shared_ffn: int) -> int:
    """Matrix parameters of a layer's attention, router and shared experts."""
    query, key = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    return model.hidden_size * (2 * query + 2 * key + model.num_experts + 3 * shared_ffn)
