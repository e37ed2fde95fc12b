"""The features of Megatron's MoE layer that have to hold whatever carries the tokens, and its alltoall dispatcher to
compare with."""

from __future__ import annotations

from typing import Any

import torch

import megatron_ep_v2
from megatron_ep_v2.buffers.pool import buffers
from tests.helpers.compare import relative_errors
from tests.helpers.megatron_layer import (
    CAPACITY_FACTOR,
    build_layer,
    hidden_states,
    process_groups,
    step,
    use_dispatcher,
)
from tests.helpers.progress import say
from tests.helpers.shapes import Shape

SHARED = {"moe_shared_expert_intermediate_size": 32}
SELECTIVE = {"recompute_granularity": "selective"}
WHOLE_LAYER = {**SELECTIVE, "recompute_modules": ["moe"]}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "three micro-batches in flight": {"micro_batches": 3},
    "uneven, one rank without a token": {"tokens_of_rank_1": 0},
    "capacity factor": CAPACITY_FACTOR,
    "router in fp64": {"moe_router_dtype": "fp64"},
    "shared experts": SHARED,
}


def batch_of(group: Any, shape: Shape, feature: dict[str, Any]) -> tuple[torch.Tensor, int, dict[str, Any]]:
    """Hidden states of this rank, micro-batches, and the fields of the configuration."""
    fields = dict(feature)
    micro_batches, tokens_of_rank_1 = fields.pop("micro_batches", 1), fields.pop("tokens_of_rank_1", None)
    tokens = shape.tokens // 8
    if tokens_of_rank_1 is not None:
        tokens = tokens_of_rank_1 if group.rank() == 1 else tokens - group.rank() % 3
    return hidden_states(shape, tokens, 1), micro_batches, fields


def compare_with_alltoall(
    group: Any, shape: Shape, features: dict[str, dict[str, Any]], layouts: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """ "feature, layout" -> tensor -> relative L2 distance between the flex dispatcher and Megatron's alltoall. All
    features of a layout share one buffer, as the layers of a model do."""
    errors = {}
    with process_groups():
        use_dispatcher(shape, "alltoall")
        theirs = {}
        for name, feature in features.items():
            say(f"alltoall: {name}", group)
            theirs[name] = _run_feature(group, shape, "alltoall", feature)
        for layout in layouts:
            use_dispatcher(shape, "flex", layout)
            for name, feature in features.items():
                say(f"{layout}: {name}", group)
                errors[f"{name}, {layout}"] = relative_errors(_run_feature(group, shape, "flex", feature), theirs[name])
            assert len(buffers()) == 1
            say(f"{layout}: destroy the buffer", group)
            megatron_ep_v2.destroy_buffers()
    return errors


def _run_feature(group: Any, shape: Shape, dispatcher: str, feature: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A training step, and "eval": the output without gradients (alltoall's is the one that it trained with)."""
    hidden, micro_batches, fields = batch_of(group, shape, feature)
    layer = build_layer(shape, dispatcher, **fields)
    results = step(layer, hidden, micro_batches)
    if dispatcher == "alltoall":
        return results | {"eval": results["output 0"]}
    layer.eval()
    with torch.no_grad():
        return results | {"eval": layer(hidden)[0]}
