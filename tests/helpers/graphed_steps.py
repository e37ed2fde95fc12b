"""Steps of the example's trainer, eager and replayed from a graph: with accumulation, other micro-batches, evaluations,
a checkpoint, and steps that need more rows than the graph has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

import megatron_ep_v2
from megatron_ep_v2 import sync_free
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import LayoutOverflowError
from megatron_ep_v2.megatron.qwen3_moe.options import ModelShape, Recipe, TrainerOptions
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer
from tests.helpers.harness import isolated
from tests.helpers.megatron_layer import process_groups
from tests.helpers.poison import poison_tails
from tests.helpers.progress import say

T = TypeVar("T")
GPU_SHAPE = ModelShape(
    num_layers=2,
    hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=128,
    ffn_hidden_size=1024,
    moe_ffn_hidden_size=256,
    num_experts=0,  # see `for_ranks`
    topk=4,
    seq_length=128,
)


def for_ranks(shape: ModelShape, ranks: int) -> ModelShape:
    """With as many experts on a rank as a token selects, so that all of a token's can be on one."""
    return replace(shape, num_experts=shape.topk * max(ranks, 2))


def recipe(ranks: int) -> Recipe:
    """One micro-batch of one sequence on each rank."""
    return Recipe(steps=1000, global_batch_size=ranks, micro_batch_size=1, lr=1e-3, min_lr=1e-4, warmup_steps=10)


@dataclass(frozen=True)
class Place:
    """Where the steps run.

    Attributes:
        shape: See `for_ranks`.
        settings: Of `install()`.
        device: "cuda" (the process' current GPU) or "cpu".
        dtype: Of the model.
    """

    shape: ModelShape
    settings: dict[str, str | bool]
    device: str
    dtype: str


@dataclass
class Run:
    """A trainer and what its steps have said.

    Attributes:
        losses: Loss and gradient norm of each step.
        repeated: Steps that were run again, with more room.
    """

    rank: int
    trainer: Trainer
    losses: list[tuple[float, float]] = field(default_factory=list)
    repeated: int = 0

    def __post_init__(self) -> None:
        shape, device = self.trainer.options.shape, self.trainer.device
        self._bias = torch.zeros(shape.num_experts, device=device)  # also a replay reads it
        for layer in self.trainer.moe_layers:
            layer.router.gating = _biased(layer.router.gating, self._bias)

    def again(self, action: Callable[[], T]) -> T:
        while True:
            try:
                return action()
            except LayoutOverflowError:
                self.repeated += 1
                sync_free.grow()

    def steps(self, count: int, micro_batches: int = 1, sequences: int = 1, *, one_rank: bool = False) -> None:
        """Steps on random tokens; `one_rank`: the first rank's experts get all of them."""
        shape = self.trainer.options.shape
        self._bias[: shape.topk] = 100.0 if one_rank else 0.0
        for _ in range(count):
            generator = torch.Generator().manual_seed(1000 * len(self.losses) + self.rank)
            size = (micro_batches, sequences, shape.seq_length // sequences + 1)
            tokens = torch.randint(256, size, generator=generator)
            stats = self.again(lambda: self.trainer.step(list(tokens)))  # noqa: B023
            self.losses.append((stats.loss, stats.grad_norm))

    def evaluate(self) -> None:
        tokens = torch.arange(self.trainer.options.shape.seq_length + 1)[None] % 256
        loss = self.again(lambda: self.trainer.evaluate([(tokens, torch.ones(1))]))
        self.losses.append((loss, 0.0))


def _biased(theirs: Callable[[torch.Tensor], torch.Tensor], bias: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda hidden: theirs(hidden) + bias


@contextlib.contextmanager
def run(group: Any, place: Place, graph: bool, **settings: Any) -> Iterator[Run]:
    """A trainer in sync-free mode, its steps in a graph or not."""
    shape = for_ranks(place.shape, group.size())
    chosen = {**place.settings, **settings, "num_max_tokens_per_rank": shape.seq_length}
    with process_groups():
        megatron_ep_v2.install(sync_free=True, experts="grouped", **chosen)
        options = TrainerOptions(
            shape=shape, recipe=recipe(group.size()), dtype=place.dtype, experts="grouped", cuda_graph=graph
        )
        device = torch.device(place.device, torch.cuda.current_device() if place.device == "cuda" else None)
        yield Run(group.rank(), Trainer(options, device))
        megatron_ep_v2.destroy_buffers()


@isolated
def every_kind(group: Any, place: Place, graph: bool, poison: bool) -> dict[str, Any]:
    """Losses and weights of steps of every kind, and what the graph took."""
    with run(group, place, graph, deterministic=True, sync_free_rows_percent=70) as job:
        say(f"graph={graph}: as many rows as the first steps need", group)
        job.steps(3)
        if poison:
            poison_tails(next(iter(pool._pool)))
        sync_free.fit(0)
        job.steps(6)
        before = job.repeated
        say(f"graph={graph}: more rows than the graph has", group)
        job.steps(2, one_rank=True)
        found: dict[str, Any] = {"repeated in the graph": job.repeated - before}
        job.steps(4)
        say(f"graph={graph}: evaluation and checkpoint", group)
        job.evaluate()
        job.steps(3)
        state = job.trainer.state_dict()
        saved = {"step": state["step"], "optimizer": torch.utils._pytree.tree_map(_copied, state["optimizer"])}
        job.steps(2)
        job.trainer.load_state_dict(saved)  # type: ignore[arg-type]
        job.steps(2)
        say(f"graph={graph}: accumulation and other micro-batches", group)
        for micro_batches, sequences in ((2, 1), (8, 1), (1, 2), (1, 1)):
            job.steps(4, micro_batches, sequences)
            say(f"graph={graph}: {micro_batches} of {sequences}", group)
        captures = job.trainer.graph.captures if job.trainer.graph else []
        found["captures"] = len(captures)
        found["MiB"] = [taken.pool_bytes / 2**20 for taken in captures]
        found["losses"] = job.losses
        found["weights"] = {name: value.detach().cpu() for name, value in job.trainer.model.named_parameters()}
    return found


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


@isolated
def many(group: Any, place: Place, graph: bool, deterministic: bool) -> list[tuple[float, float]]:
    """200 steps."""
    with run(group, place, graph, deterministic=deterministic) as job:
        job.steps(5)
        sync_free.fit()
        job.steps(195)
    return job.losses
