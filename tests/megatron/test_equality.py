"""Training through the flex dispatcher on the reference buffer, against Megatron-Core's own alltoall dispatcher.

The example's model and trainer, from one seed, in fp32 with top-4: with two terms only, any order adds up to the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from qwen3_moe.options import Options

from megatron_ep_v2.fused_a2a import FusedDispatch
from megatron_ep_v2.megatron.qwen3_moe.options import ModelShape, Recipe
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer
from tests.helpers.compare import relative_error
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import installed
from tests.helpers.shapes import Split

pytestmark = pytest.mark.slow

STEPS = 20
LOSS_TOLERANCE = 1e-5  # absolute, in nats
GRADIENT_TOLERANCE = 2e-6  # relative L2, each parameter by itself

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    ffn_hidden_size=128,
    moe_ffn_hidden_size=32,
    num_experts=8,
    topk=4,
    seq_length=48,
    vocab_size=64,
)
RECIPE = Recipe(steps=STEPS, global_batch_size=8, lr=5e-3, min_lr=5e-4, warmup_steps=5, aux_loss_coeff=1e-2)


@dataclass(frozen=True)
class Run:
    """What a rank has after training.

    Attributes:
        losses: Of each step, over all ranks.
        gradients: Of the first step, by parameter: dense ones of all ranks, this rank's own experts.
    """

    losses: list[float]
    gradients: dict[str, torch.Tensor]


def make_batch(step: int, rank: int, ranks: int) -> torch.Tensor:
    """This rank's sequences: every token is the one before plus a stride of the sequence's own, which can be learnt."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(SHAPE.vocab_size, (RECIPE.global_batch_size, 1), generator=generator)
    stride = torch.randint(1, 4, (RECIPE.global_batch_size, 1), generator=generator)
    sequences = (start + stride * torch.arange(SHAPE.seq_length + 1)) % SHAPE.vocab_size
    return sequences.chunk(ranks)[rank]


def train(group: Any, variant: str) -> Run:
    """variant: alltoall; a layout of the flex dispatcher; or that layout and "broken"."""
    layout, _, broken = variant.partition(" ")
    kind = "alltoall" if variant == "alltoall" else "flex"
    settings = {"layout": layout} if kind == "flex" else {}
    with (
        installed(Split(1, group.size()), **settings),
        undone(),
        pytest.MonkeyPatch.context() as patch,
    ):
        if broken:
            patch.setattr(FusedDispatch, "backward", staticmethod(lose_half_of_the_gradient))
        trainer = Trainer(Options(shape=SHAPE, recipe=RECIPE, dispatcher=kind, dtype="fp32"), torch.device("cpu"))
        batches = [make_batch(step, group.rank(), group.size()) for step in range(STEPS)]
        trainer.backward(batches[:1])
        gradients = {name: gradient.clone() for name, gradient in trainer.named_gradients().items()}
        return Run([trainer.step([batch]).loss for batch in batches], gradients)


@contextmanager
def undone() -> Iterator[None]:
    """The example's substitutions for the alltoall dispatcher end with the run."""
    held = [token_dispatcher, token_dispatcher.MoEAlltoAllTokenDispatcher]
    before = [dict(vars(holder)) for holder in held]
    try:
        yield
    finally:
        for holder, names in zip(held, before):
            for name, value in names.items():
                if vars(holder)[name] is not value:
                    setattr(holder, name, value)


whole_backward = FusedDispatch.backward


def lose_half_of_the_gradient(ctx: Any, *gradients: Any) -> Any:
    """What comes out of the dispatch's backward, without half of the selections' probabilities."""
    grad_x, grad_indices, grad_probs, *rest = whole_backward(ctx, *gradients)
    grad_probs[:, grad_probs.shape[1] // 2 :] = 0
    return grad_x, grad_indices, grad_probs, *rest


@functools.cache
def trained(ranks: int, variant: str) -> list[Run]:
    return run_ranks(ranks, train, variant)


def assert_same_losses(ours: list[Run], theirs: list[Run]) -> None:
    for step, (loss, expected) in enumerate(zip(ours[0].losses, theirs[0].losses, strict=True), start=1):
        assert abs(loss - expected) <= LOSS_TOLERANCE, f"step {step}: loss {loss} instead of {expected}"


def assert_same_gradients(ours: list[Run], theirs: list[Run]) -> None:
    for run, expected in zip(ours, theirs, strict=True):
        assert run.gradients.keys() == expected.gradients.keys()
        errors = {n: relative_error(g, expected.gradients[n]) for n, g in run.gradients.items()}
        wrong = {name: error for name, error in errors.items() if not error <= GRADIENT_TOLERANCE}
        assert not wrong, f"relative L2 error: {wrong}"


COMPARED = [("compact", "alltoall"), ("expanded", "alltoall"), ("compact", "expanded")]
BOTH = pytest.mark.parametrize("pair", COMPARED, ids="-".join)
RANKS = pytest.mark.parametrize("ranks", [2, 4])


@RANKS
@BOTH
def test_losses_of_twenty_steps(ranks: int, pair: tuple[str, str]) -> None:
    ours, theirs = (trained(ranks, variant) for variant in pair)
    assert len(ours[0].losses) == STEPS
    assert_same_losses(ours, theirs)


@RANKS
@BOTH
def test_gradients_of_the_first_step(ranks: int, pair: tuple[str, str]) -> None:
    ours, theirs = (trained(ranks, variant) for variant in pair)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("layout", ["compact", "expanded"])
def test_a_lost_part_of_the_routers_gradient_is_noticed(layout: str) -> None:
    """The negative control: both comparisons fail where the dispatch's backward forgets half of the probabilities."""
    broken, whole = trained(2, f"{layout} broken"), trained(2, "alltoall")
    with pytest.raises(AssertionError, match=r"relative L2 error.*router\.weight"):
        assert_same_gradients(broken, whole)
    with pytest.raises(AssertionError, match=r"^step \d+: loss"):
        assert_same_losses(broken, whole)


@RANKS
def test_the_run_that_is_compared_is_worth_comparing(ranks: int) -> None:
    """It learns, and every parameter has a gradient: embeddings, attention, norms, router and all experts."""
    runs = trained(ranks, "alltoall")
    assert runs[0].losses[-1] < 0.8 * runs[0].losses[0]
    names = {name for run in runs for name in run.gradients}
    for layer in range(SHAPE.num_layers):
        assert f"decoder.layers.{layer}.mlp.router.weight" in names
        for expert in range(SHAPE.num_experts):
            assert f"decoder.layers.{layer}.mlp.experts.{expert}.linear_fc1.weight" in names
    for run in runs:
        assert all(gradient.norm() > 0 for gradient in run.gradients.values())
