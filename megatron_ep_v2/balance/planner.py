"""Which experts get a replica on which rank, and which selections go there: a plan that is the same on every rank.

PyTorch and Python, for every device; `planner_triton` is equal on CUDA tensors, where nothing is read on the host.

Letters: P ranks, E logical experts, L = E // P of them on each rank, R replica slots on each rank, T tokens of this
rank, K selections of each. A logical expert's home is rank e // L. Physical ids are rank * (L + R) + n: n < L are the
rank's own experts, the others its replica slots. A selection's ordinal is its number among all selections of its
expert: those of earlier ranks come first, then this rank's in the order of (token, k).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from megatron_ep_v2.errors import InputError
from megatron_ep_v2.kernels.select import triton_if_installed

# A replica's weights and gradients cross the link once a micro-batch. That pays from about 500 rows where the push is
# hidden, from about 2000 where it is not (computed for 8 H200, docs/balance.md).
MIN_ROWS = 1024
FROM_PERCENT = 110  # of the mean: with less on the busiest rank nothing is planned


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where the selections of each expert are computed. All tensors are int64, on the device of the counts.

    Expert e keeps ordinals 0 to home_rows[e] - 1 at home. The replica slots that hold it have the others, each a
    segment.

    Attributes:
        experts: [P, R], the logical expert in each replica slot; -1 = unused.
        starts: [P, R], the first ordinal of each slot's segment; 0 = unused.
        rows: [P, R], the length of each slot's segment; 0 = unused.
        home_rows: [E].
        before: [P, E], selections of each expert on earlier ranks: the ordinal of a rank's first one.
    """

    experts: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor
    home_rows: torch.Tensor
    before: torch.Tensor

    def rank_rows(self) -> torch.Tensor:
        """[P] int64, rows that each rank receives."""
        return self.home_rows.view(len(self.experts), -1).sum(dim=1) + self.rows.sum(dim=1)


class Move(NamedTuple):
    """A segment of an expert's ordinals that goes to a replica slot of another rank."""

    expert: int
    rank: int
    slot: int
    start: int
    rows: int


def overload(rank_rows: torch.Tensor) -> torch.Tensor:
    """Rows of the busiest rank over the mean of all ranks: 1 is even, P the worst; 1 where there are no rows.

    Args:
        rank_rows: [..., P] rows that each rank receives.

    Returns:
        [...] fp64.
    """
    rows = rank_rows.double()
    mean = rows.mean(dim=-1)
    return torch.where(mean > 0, rows.amax(dim=-1) / mean, 1.0)


def count(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count this rank's selections. Does not wait for the device.

    Args:
        topk_idx: [T, K] int64 logical ids; those outside 0 to E - 1, such as -1, are not counted.

    Returns:
        [E] int64: a row of `plan`'s counts.
    """
    flat = topk_idx.flatten()
    bins = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:-1]


def plan(counts: torch.Tensor, num_slots: int, min_rows: int = MIN_ROWS, from_percent: int = FROM_PERCENT) -> Plan:
    """Plan replicas for one dispatch. Depends on the arguments alone, so ranks with equal counts have equal plans.

    Greedy, in integers, ties by the lowest id: while a rank has more than the mean (rounded up), the busiest one gives
    rows of its largest expert to the rank with most room below the mean that has a free slot: as many as the expert
    has, the room takes and the busiest rank has above the mean. It ends where that is less than `min_rows`. So no rank
    ends above the busiest one before, none is the home of its own replica, and none gets one twice: a move uses up the
    expert, the room or what is above the mean. It is not the best of all plans: a rank above the mean takes no replica,
    though it could give away more of its own.

    Args:
        counts: [P, E] int64, selections of each logical expert on each rank (`count`, gathered).
        num_slots: R.
        min_rows: The fewest rows for which a replica is planned; 1 or more.
        from_percent: Nothing is planned while the busiest rank has less than so much of the mean; 100 or more.

    Raises:
        InputError: A shape, dtype or number differs from the above.
    """
    _check(counts, num_slots, min_rows, from_percent)
    if (kernels := _kernels(counts)) is not None:
        return Plan(**kernels.plan(counts.contiguous(), num_slots, min_rows, from_percent))
    return _plan(counts, num_slots, min_rows, from_percent)


def map_selections(topk_idx: torch.Tensor, of: Plan, rank: int) -> torch.Tensor:
    """Translate this rank's selections to physical ids: each to its home or to one replica, by its ordinal.

    Args:
        topk_idx: [T, K] int64 logical ids, those that were counted for the plan.
        of: The plan.
        rank: This rank's number in the group, 0 to P - 1.

    Returns:
        [T, K] int64; -1 where the logical id is not one of 0 to E - 1.

    Raises:
        InputError: A shape, dtype or number differs from the above.
    """
    if topk_idx.dim() != 2 or topk_idx.dtype != torch.int64 or not 0 <= rank < len(of.experts):
        raise InputError(
            "these selections cannot be mapped to physical experts",
            found=f"{topk_idx.dtype} {tuple(topk_idx.shape)} of rank {rank}",
            needed=f"topk_idx [T, K] int64 of a rank from 0 to {len(of.experts) - 1}",
            fix="pass the router's topk_idx and group.rank()",
        )
    if (kernels := _kernels(topk_idx)) is not None:
        mapped: torch.Tensor = kernels.map_selections(
            topk_idx.contiguous(), of.experts, of.starts, of.rows, of.before[rank]
        )
        return mapped
    return _map_selections(topk_idx, of, rank)


def follow(topk_idx: torch.Tensor, logical: torch.Tensor, physical: torch.Tensor, home: torch.Tensor) -> torch.Tensor:
    """Translate selections as an earlier run of the same tokens did, so that both go to the same replica.

    Args:
        topk_idx: [T, K] int64 logical ids, in any order.
        logical, physical: [T, K] int64, the earlier run's selections and what they were translated to.
        home: [E] int64, the physical id of each expert at home (`homes`).

    Returns:
        [T, K] int64; -1 for a negative id. An expert that the earlier run did not select for the token goes home, so
        equal physical ids mean equal logical ones.
    """
    at_home = torch.where(topk_idx < 0, -1, home[topk_idx.clamp(min=0)])
    if topk_idx.shape != logical.shape:
        return at_home
    same = topk_idx[:, :, None] == logical[:, None, :]
    before = physical.gather(1, same.to(torch.int8).argmax(dim=2))
    return torch.where(same.any(dim=2), before, at_home)


def homes(num_experts: int, ranks: int, num_slots: int, device: torch.device | None = None) -> torch.Tensor:
    """[E] int64, the physical id of each logical expert at home, of `ranks` ranks with `num_slots` slots each."""
    expert, local = torch.arange(num_experts, device=device), num_experts // ranks
    return expert // local * (local + num_slots) + expert % local


def greedy(totals: list[int], ranks: int, num_slots: int, min_rows: int, from_percent: int) -> list[Move]:
    """The moves of `plan`, in the order in which they are found.

    Args:
        totals: [E], selections of each expert on all ranks.
        ranks: P, which divides E.
        num_slots, min_rows, from_percent: As for `plan`.
    """
    local, total = len(totals) // ranks, sum(totals)
    quotas = list(totals)  # what each home keeps
    load = [sum(totals[rank * local : (rank + 1) * local]) for rank in range(ranks)]
    held: list[list[int]] = [[] for _ in range(ranks)]  # experts in each rank's replica slots
    mean = -(-total // ranks)
    if max(load) * ranks * 100 < from_percent * total:
        return []
    moves = []
    for _ in range(ranks * num_slots):
        busiest = _first_largest(load)
        expert = busiest * local + _first_largest(quotas[busiest * local : (busiest + 1) * local])
        room = [mean - load[rank] if rank != busiest and len(held[rank]) < num_slots else -1 for rank in range(ranks)]
        target = _first_largest(room)
        rows = min(quotas[expert], room[target], load[busiest] - mean)
        if rows < min_rows:
            break
        quotas[expert] -= rows
        load[busiest] -= rows
        load[target] += rows
        moves.append(Move(expert, target, len(held[target]), quotas[expert], rows))
        held[target].append(expert)
    return moves


def _first_largest(values: list[int]) -> int:
    return max(range(len(values)), key=values.__getitem__)  # of equals the first


def _plan(counts: torch.Tensor, num_slots: int, min_rows: int, from_percent: int) -> Plan:
    """`plan` on any device; reads the counts on the host."""
    ranks = len(counts)
    home_rows = counts.sum(dim=0)
    experts = torch.full((ranks, num_slots), -1, device="cpu")
    starts, rows = torch.zeros_like(experts), torch.zeros_like(experts)
    kept = home_rows.cpu()
    for move in greedy(kept.tolist(), ranks, num_slots, min_rows, from_percent):
        experts[move.rank, move.slot] = move.expert
        starts[move.rank, move.slot], rows[move.rank, move.slot] = move.start, move.rows
        kept[move.expert] -= move.rows
    found = (tensor.to(counts.device) for tensor in (experts, starts, rows, kept))
    experts, starts, rows, home_rows = found
    return Plan(experts=experts, starts=starts, rows=rows, home_rows=home_rows, before=counts.cumsum(dim=0) - counts)


def _map_selections(topk_idx: torch.Tensor, of: Plan, rank: int) -> torch.Tensor:
    """`map_selections` on any device."""
    (ranks, num_slots), num_experts = of.experts.shape, len(of.home_rows)
    local, flat = num_experts // ranks, topk_idx.flatten()
    valid = (flat >= 0) & (flat < num_experts)
    expert = torch.where(valid, flat, num_experts)
    order = torch.argsort(expert, stable=True)
    bins = torch.cat((count(topk_idx, num_experts), (~valid).sum()[None]))
    first = bins.cumsum(0) - bins
    in_order = torch.arange(len(flat), device=flat.device) - first[expert[order]]
    number = torch.empty_like(flat).scatter_(0, order, in_order)  # of each selection among this rank's of its expert
    expert = expert.clamp(max=num_experts - 1)
    ordinal = number + of.before[rank][expert]
    physical = expert // local * (local + num_slots) + expert % local
    segments = zip(of.experts.flatten(), of.starts.flatten(), of.rows.flatten(), strict=True)
    for n, (held, start, rows) in enumerate(segments):
        here = (expert == held) & (ordinal >= start) & (ordinal < start + rows)
        replica = n // num_slots * (local + num_slots) + local + n % num_slots
        physical = torch.where(here, replica, physical)
    return torch.where(valid, physical, -1).view(topk_idx.shape)


def _check(counts: torch.Tensor, num_slots: int, min_rows: int, from_percent: int) -> None:
    if counts.dim() != 2 or counts.dtype != torch.int64 or not counts.numel() or counts.shape[1] % len(counts):
        raise InputError(
            "replicas cannot be planned for these counts",
            found=f"{counts.dtype} {tuple(counts.shape)}",
            needed="[P, E] int64, selections of E logical experts on P ranks, E a multiple of P",
            fix="gather count(topk_idx, num_experts) of all ranks",
        )
    if num_slots < 0 or min_rows < 1 or from_percent < 100:
        raise InputError(
            "a number of the plan is out of range",
            found=f"num_slots={num_slots}, min_rows={min_rows}, from_percent={from_percent}",
            needed="num_slots 0 or more, min_rows 1 or more, from_percent 100 or more",
            fix=f"num_slots=2, min_rows={MIN_ROWS}, from_percent={FROM_PERCENT}",
        )


def _kernels(tensor: torch.Tensor) -> ModuleType | None:
    """The Triton module for CUDA tensors; None without Triton, which is slower and waits for the device."""
    return triton_if_installed(__name__, "PyTorch plans redundant experts") if tensor.is_cuda else None
