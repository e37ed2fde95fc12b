"""Several kinds of experts in the one model of `bench --step`: the same weights, gradients and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ep_v2.megatron.qwen3_moe.expert_kinds import ExpertSet, one_by_one, owner
from megatron_ep_v2.megatron.qwen3_moe.options import ModelShape, Recipe, TrainerOptions
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer
from tests.helpers.compare import relative_error, worst
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import installed
from tests.helpers.shapes import Split

MODEL = ModelShape(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    ffn_hidden_size=384,
    moe_ffn_hidden_size=64,
    num_experts=16,
    topk=4,
    seq_length=32,
)
RECIPE = Recipe(steps=240, global_batch_size=4, micro_batch_size=1, lr=5e-3, min_lr=5e-4, warmup_steps=20)


def steps_of_each_kind(group: Any, with_optimizer: bool) -> dict[str, Any]:
    """Distance of the gradients from the first kind's, by kind; whether weights and gradients are the same memory; how
    far a step moves the weights that Megatron's experts read; whose experts ran, micro-batch by micro-batch."""
    kinds = ("grouped", "megatron", "sequential")
    with installed(Split(1, 2)):
        options = TrainerOptions(shape=MODEL, recipe=RECIPE, dtype="fp32", experts=owner(kinds))
        trainer = Trainer(options, torch.device("cpu"), with_optimizer)
        owners = [layer.experts for layer in trainer.moe_layers]
        sets = {kind: ExpertSet(kind, trainer, owners) for kind in kinds}
        generator = torch.Generator().manual_seed(group.rank())
        batches = list(torch.randint(MODEL.vocab_size, (2, 1, MODEL.seq_length + 1), generator=generator))
        gradients, ran = {}, []
        for kind, experts in sets.items():
            experts.modules[0].register_forward_hook(lambda *_, kind=kind: ran.append(kind))
        for kind, experts in sets.items():
            experts.enter()
            trainer.backward(batches)
            experts.leave()
            gradients[kind] = {name: gradient.clone() for name, gradient in trainer.named_gradients().items()}
        shared = []
        for layer, own in enumerate(owners):
            for linear in ("linear_fc1", "linear_fc2"):
                stacked = getattr(own, linear).weight
                shared += [
                    getattr(sets[kind].modules[layer], linear).weight is stacked for kind in ("grouped", "sequential")
                ]
                for expert, weight in enumerate(one_by_one(sets["megatron"].modules[layer], linear)):
                    shared.append(weight.data_ptr() == stacked[expert].data_ptr() and weight.shape == stacked.shape[1:])
                    shared.append(weight.main_grad.data_ptr() == stacked.main_grad[expert].data_ptr())
        read = one_by_one(sets["megatron"].modules[0], "linear_fc2")[0]
        before = read.detach().clone()
        trainer.step(batches)
    assert all(gradient.norm() > 0 for gradient in gradients["grouped"].values())
    return {
        "distances": {
            kind: worst(relative_error(found[name], gradient) for name, gradient in gradients["grouped"].items())
            for kind, found in gradients.items()
        },
        "ran": ran[: -len(batches)],
        "shared": shared,
        "moved": relative_error(read.detach(), before),
        "has_optimizer": trainer.optimizer is not None,
    }


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_kinds_of_experts_share_weights_and_gradients(with_optimizer: bool) -> None:
    for found in run_ranks(2, steps_of_each_kind, with_optimizer):
        assert len(found["shared"]) == 2 * 2 * (2 + 2 * MODEL.num_experts // 2) and all(found["shared"])
        assert worst(found["distances"].values()) < 1e-6
        assert found["ran"] == ["grouped", "grouped", "megatron", "megatron", "sequential", "sequential"]
        assert found["has_optimizer"] == with_optimizer and (found["moved"] > 0) == with_optimizer
