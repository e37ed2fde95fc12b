"""Batches to dispatch: how many tokens each rank has, what they select, what they carry; and layouts of what arrives.

A batch is a function of its `Case` alone, so that every rank makes its own part and the test makes all of them again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Case:
    """One batch of a whole group.

    Attributes:
        name: Shown by pytest.
        tokens: Tokens of each rank; its length is the group's size.
        routing: A name in ROUTINGS.
        hidden, topk, experts, ffn: H, K, the experts of the whole group and their intermediate size.
        dtype: Of the payload.
        scales: None, or the dtype of an fp8 payload's scales: float32 (one per 128 columns) or int32 (4 x UE8M0).
        strided: Every tensor is a non-contiguous view.
        seed: Of all random numbers.
    """

    name: str
    tokens: tuple[int, ...]
    routing: str = "random"
    hidden: int = 32
    topk: int = 3
    experts: int = 0
    ffn: int = 8
    dtype: torch.dtype = torch.float32
    scales: torch.dtype | None = None
    strided: bool = False
    seed: int = 1

    def __str__(self) -> str:
        return f"{self.name}-{self.size}"

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def capacity(self) -> int:
        """Above every rank's tokens, so that it cannot be mistaken for one of them."""
        return max(self.tokens) + 3

    @property
    def local_experts(self) -> int:
        return self.experts // self.size


@dataclass(frozen=True)
class Layout:
    """How a dispatch delivers; zero: with zeros in padding."""

    do_expand: bool
    alignment: int = 1
    zero: bool = False

    def __str__(self) -> str:
        return f"{'expanded' if self.do_expand else 'compact'}-{self.alignment}{'-zero' if self.zero else ''}"

    def arguments(self) -> dict[str, Any]:
        """As `fused_dispatch` takes it."""
        return {"do_expand": self.do_expand, "expert_alignment": self.alignment}


COMPACT, EXPANDED, PADDED = Layout(False), Layout(True), Layout(True, 16)


@dataclass(frozen=True)
class Batch:
    """What one rank dispatches: x [T, H], scales [T, S] or None, topk_idx [T, K] int64, topk_weights [T, K]."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor

    @property
    def payload(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self.x if self.scales is None else (self.x, self.scales)


def make_batch(case: Case, rank: int, *, turn: int = 0, weights_dtype: torch.dtype = torch.float32) -> Batch:
    """The batch of one rank. Another `turn` has the same selections with other values."""
    tokens = case.tokens[rank]
    topk_idx = ROUTINGS[case.routing](case, rank, _generator(case, rank, -1))
    generator = _generator(case, rank, turn)
    x = torch.randn(tokens, case.hidden, generator=generator, dtype=torch.float64).to(case.dtype)
    # Weights of dropped selections are not zero on purpose: they may not travel.
    weights = torch.rand(tokens, case.topk, generator=generator, dtype=torch.float64).to(weights_dtype)
    scales = None
    if case.scales == torch.float32:
        scales = torch.rand(tokens, case.hidden // 128, generator=generator)
    elif case.scales == torch.int32:
        scales = torch.randint(1, INT32_MAX, (tokens, case.hidden // 512), generator=generator).to(torch.int32)
    if case.strided:
        x, topk_idx, weights = map(strided_copy, (x, topk_idx, weights))
        scales = None if scales is None else strided_copy(scales)
    return Batch(x, scales, topk_idx, weights)


@functools.lru_cache(maxsize=256)
def make_batches(case: Case, *, turn: int = 0, weights_dtype: torch.dtype = torch.float32) -> list[Batch]:
    """The batches of all ranks. Shared: not to be written to."""
    return [make_batch(case, rank, turn=turn, weights_dtype=weights_dtype) for rank in range(case.size)]


def strided_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Equal to `tensor`, and a view with gaps between rows and between elements."""
    wide = torch.zeros([2 * length for length in tensor.shape], dtype=tensor.dtype, device=tensor.device)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


def _generator(case: Case, rank: int, turn: int) -> torch.Generator:
    return torch.Generator().manual_seed(((case.seed * 64 + rank) * 64 + turn + 1) * 64 + case.size)


def _random(case: Case, rank: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(case.tokens[rank], case.experts, generator=generator).argsort(dim=1)[:, : case.topk]


def _drop_some(case: Case, rank: int, generator: torch.Generator) -> torch.Tensor:
    topk_idx = _random(case, rank, generator)
    return topk_idx.masked_fill(torch.rand(topk_idx.shape, generator=generator) < 0.4, -1)


def _idle_expert(case: Case, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Some selections are dropped, and no token selects the last expert."""
    topk_idx = _drop_some(case, rank, generator)
    return topk_idx.masked_fill(topk_idx == case.experts - 1, -1)


def _drop_tokens(case: Case, rank: int, generator: torch.Generator) -> torch.Tensor:
    topk_idx = _random(case, rank, generator)
    topk_idx[::2] = -1
    return topk_idx


def _drop_rank(case: Case, rank: int, generator: torch.Generator) -> torch.Tensor:
    topk_idx = _random(case, rank, generator)
    return torch.full_like(topk_idx, -1) if rank == 0 else topk_idx


def _drop_all(case: Case, rank: int, generator: torch.Generator) -> torch.Tensor:
    return torch.full_like(_random(case, rank, generator), -1)


def _to_one_rank(case: Case, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Everything to the last rank."""
    topk_idx = _random(case, rank, generator)
    return topk_idx.masked_fill(topk_idx < case.experts - case.local_experts, -1)


def _to_one_expert(case: Case, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Every token selects expert 1 and nothing else, in any column."""
    topk_idx = torch.full((case.tokens[rank], case.topk), -1, dtype=torch.int64)
    column = torch.randint(case.topk, (case.tokens[rank], 1), generator=generator)
    return topk_idx.scatter_(1, column, 1)


def _starve_rank(case: Case, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Nothing to the first rank."""
    topk_idx = _random(case, rank, generator)
    return topk_idx.masked_fill(topk_idx < case.local_experts, -1)


ROUTINGS: dict[str, Callable[[Case, int, torch.Generator], torch.Tensor]] = {
    "random": _random,
    "drop some selections": _drop_some,
    "drop some, idle expert": _idle_expert,
    "drop whole tokens": _drop_tokens,
    "drop a whole rank": _drop_rank,
    "drop everything": _drop_all,
    "all to one rank": _to_one_rank,
    "all to one expert": _to_one_expert,
    "nothing to one rank": _starve_rank,
}


def edge_cases(size: int) -> list[Case]:
    """The batches that go wrong first, for a group of `size`."""
    uneven = (6, 4, 7, 5, 3, 8, 1, 9)[:size]
    return [
        Case("random", uneven, experts=3 * size),
        Case("random-large", tuple(40 + 7 * rank for rank in range(size)), experts=8 * size, topk=8, hidden=64),
        Case("one-expert-per-rank", uneven, experts=size, topk=min(3, size)),
        Case("top-1", uneven, experts=2 * size, topk=1),
        Case("top-8", uneven, experts=4 * size, topk=8),
        Case("dropped-selections", uneven, "drop some selections", experts=4 * size),
        Case("dropped-tokens", uneven, "drop whole tokens", experts=4 * size),
        Case("dropped-rank", uneven, "drop a whole rank", experts=4 * size),
        Case("dropped-everything", uneven, "drop everything", experts=4 * size),
        Case("to-one-rank", uneven, "all to one rank", experts=4 * size),
        Case("to-one-expert", uneven, "all to one expert", experts=4 * size),
        Case("starved-rank", uneven, "nothing to one rank", experts=4 * size),
        Case("one-empty-rank", (0, *uneven[1:]), experts=4 * size),
        Case("one-token", (0,) * (size - 1) + (1,), experts=4 * size),
        Case("all-empty", (0,) * size, experts=4 * size),
    ]


SMALL = replace(edge_cases(2)[0], dtype=torch.float64)
