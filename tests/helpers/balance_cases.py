"""Counts and selections of a whole group for the planner, and plain loops that say what must come out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

KINDS = ("random", "zipf", "one-hot", "empty", "unselected", "equal")


@dataclass(frozen=True)
class Case:
    """Selections of all ranks.

    Attributes:
        topk_idx: Of each rank, [T, K] int64, -1 = not selected; ranks have different T.
    """

    name: str
    topk_idx: list[torch.Tensor]
    num_experts: int
    num_slots: int
    min_rows: int
    from_percent: int

    @property
    def ranks(self) -> int:
        return len(self.topk_idx)

    def counts(self) -> torch.Tensor:
        """[P, E], one by one."""
        counts = torch.zeros(self.ranks, self.num_experts, dtype=torch.int64)
        for rank, topk_idx in enumerate(self.topk_idx):
            for expert in topk_idx.flatten().tolist():
                if expert >= 0:
                    counts[rank, expert] += 1
        return counts


def cases(seeds: int = 2, tokens: int = 60) -> Iterator[Case]:
    """Every kind of routing on 1 to 8 ranks with 0 to 2 replica slots."""
    for seed in range(seeds):
        for ranks, local in ((1, 4), (2, 1), (2, 3), (3, 2), (4, 4), (8, 2), (8, 5)):
            for kind in KINDS:
                for num_slots in (0, 1, 2):
                    generator = torch.Generator().manual_seed(1000 * seed + 10 * ranks + num_slots)
                    batches = [
                        selections(kind, tokens + 3 * rank, min(3, ranks * local), ranks * local, generator)
                        for rank in range(ranks)
                    ]
                    limits = (1, 100) if seed % 2 == 0 else (7, 110)
                    name = f"{kind} {ranks} x {local} R={num_slots} seed {seed}"
                    yield Case(name, batches, ranks * local, num_slots, *limits)


def selections(kind: str, tokens: int, topk: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """[T, K] int64, the experts of a token distinct except for -1."""
    if kind == "empty":
        return torch.empty(0, topk, dtype=torch.int64)
    if kind == "equal":
        return (torch.arange(tokens * topk) % experts).view(tokens, topk)
    scores = torch.rand(tokens, experts, generator=generator)
    if kind == "zipf":
        scores = -scores.clamp(min=1e-9).log() * -(torch.arange(experts) + 1.0)
    elif kind == "one-hot":
        scores[:, 0] = 2.0
    topk_idx = scores.topk(topk, dim=1).indices
    if kind == "unselected":
        topk_idx[torch.rand(tokens, topk, generator=generator) < 0.4] = -1
    return topk_idx


def planned_by_hand(case: Case) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The rule word for word, on single rows: for each rank its replica slots' experts, and for each expert the
    physical ids that its selections go to, in the order of their ordinals."""
    ranks, num_experts = case.ranks, case.num_experts
    local, stride = num_experts // ranks, num_experts // ranks + case.num_slots
    totals = case.counts().sum(dim=0).tolist()
    at: list[list[int]] = [[expert // local * stride + expert % local] * n for expert, n in enumerate(totals)]
    held: list[list[int]] = [[] for _ in range(ranks)]
    mean = -(-sum(totals) // ranks)

    def load(rank: int) -> int:
        return sum(physical // stride == rank for rows in at for physical in rows)

    def at_home(expert: int) -> int:
        return sum(physical % stride < local for physical in at[expert])

    worth = max(load(rank) for rank in range(ranks)) * 100 * ranks >= case.from_percent * sum(totals)
    while worth:
        busiest = min(range(ranks), key=lambda rank: (-load(rank), rank))
        own = range(busiest * local, (busiest + 1) * local)
        expert = min(own, key=lambda expert: (-at_home(expert), expert))
        free = [r for r in range(ranks) if r != busiest and len(held[r]) < case.num_slots and expert not in held[r]]
        if not free:
            break
        target = min(free, key=lambda rank: (load(rank), rank))
        rows = min(at_home(expert), mean - load(target), load(busiest) - mean)
        if rows < case.min_rows:
            break
        end = at_home(expert)
        for ordinal in range(end - rows, end):
            at[expert][ordinal] = target * stride + local + len(held[target])
        held[target].append(expert)
    return held, at


def mapped_by_hand(case: Case) -> list[list[list[int]]]:
    """Physical ids of every rank's selections, which are handed out in the order of rank, token and k."""
    _, at = planned_by_hand(case)
    left = [iter(rows) for rows in at]
    return [
        [[next(left[expert]) if expert >= 0 else -1 for expert in token] for token in topk_idx.tolist()]
        for topk_idx in case.topk_idx
    ]


def differences(kernels: Any, planner: Any, device: str, seeds: int = 1, tokens: int = 60) -> list[str]:
    """Cases in which the kernels differ from the definition: in a field of the plan, or in a selection."""
    found = []
    for case in cases(seeds, tokens):
        limits = (case.num_slots, case.min_rows, case.from_percent)
        wanted = planner._plan(case.counts(), *limits)
        got = planner.Plan(**kernels.plan(case.counts().to(device), *limits))
        for name in ("experts", "starts", "rows", "home_rows", "before"):
            if not getattr(got, name).cpu().equal(getattr(wanted, name)):
                found.append(f"{case.name}: {name}")
        for rank in {0, case.ranks - 1}:
            topk_idx = case.topk_idx[rank]
            of = (got.experts, got.starts, got.rows, got.before[rank])
            mapped = kernels.map_selections(topk_idx.to(device), *of).cpu()
            if not mapped.equal(planner._map_selections(topk_idx, wanted, rank)):
                found.append(f"{case.name}: selections of rank {rank}")
    return found
