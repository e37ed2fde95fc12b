"""What a dispatch must deliver and a combine must add up: loops over ranks, tokens and selections, sums in fp64.

Nothing here is shared with the package: an expected value that came from the code under test would prove nothing.

deep_ep does not fix the order of received rows, nor of the rows of one expert. So the oracle speaks of *which* rows
arrive, by (source rank, token, k); where they lie is read from `handle.recv_src_metadata` by the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Selection = tuple[int, int, int]  # source rank, token, k


@dataclass(frozen=True)
class Arrival:
    """What one rank receives.

    Attributes:
        rows: (source rank, token) -> the local expert of each selection, -1 where it is not this rank's. In order.
        experts: For each local expert the selections that it serves, ordered by source rank and token.
        counts, padded: Rows of each local expert, without and with padding.
        psum_rows: Running sum of the rows by source rank.
        psum_padded: Running sum of `padded`.
        real_ends: Where each expert's real rows end in the expanded layout.
    """

    rows: dict[tuple[int, int], list[int]]
    experts: list[list[Selection]]
    counts: list[int]
    padded: list[int]
    psum_rows: list[int]
    psum_padded: list[int]
    real_ends: list[int]

    def expanded_order(self) -> list[Selection | None]:
        """The rows of the expanded layout ordered by expert, source rank and token; None is padding."""
        order: list[Selection | None] = []
        for selections, padded in zip(self.experts, self.padded, strict=True):
            order += selections
            order += [None] * (padded - len(selections))
        return order


def arrival(topk_idx: list[torch.Tensor], rank: int, num_experts: int, alignment: int) -> Arrival:
    """What `rank` receives when rank r dispatches tokens with the selections `topk_idx[r]` [T, K]."""
    num_local = num_experts // len(topk_idx)
    rows: dict[tuple[int, int], list[int]] = {}
    experts: list[list[Selection]] = [[] for _ in range(num_local)]
    psum_rows = []
    for source, of_rank in enumerate(topk_idx):
        for token, ids in enumerate(of_rank.tolist()):
            local = [i - rank * num_local if i >= 0 and i // num_local == rank else -1 for i in ids]
            if any(expert >= 0 for expert in local):
                rows[source, token] = local
            for k, expert in enumerate(local):
                if expert >= 0:
                    experts[expert].append((source, token, k))
        psum_rows.append(len(rows))

    counts = [len(selections) for selections in experts]
    padded = [-(-count // alignment) * alignment for count in counts]
    psum_padded = [sum(padded[: i + 1]) for i in range(num_local)]
    real_ends = [sum(padded[:i]) + counts[i] for i in range(num_local)]
    return Arrival(rows, experts, counts, padded, psum_rows, psum_padded, real_ends)


def destinations(ids: list[int], num_local: int) -> list[int]:
    """The ranks that a token with these selections is sent to, without repetition."""
    return sorted({i // num_local for i in ids if i >= 0})


@dataclass(frozen=True)
class Sums:
    """Exact sums [T, H] in fp64, and what bounds the rounding errors of sums in a lower precision.

    Attributes:
        total: The sums.
        partials: Sum of the magnitudes of what may be rounded to the payload's dtype on the way.
        terms: Sum of the magnitudes of all terms.
    """

    total: torch.Tensor
    partials: torch.Tensor
    terms: torch.Tensor


def combined_compact(rows: torch.Tensor, topk_idx: torch.Tensor, num_local: int) -> Sums:
    """Sum over the ranks that a token went to.

    Args:
        rows: [T, ranks, H], what each rank returns for each of this rank's tokens.
        topk_idx: [T, K].
        num_local: Experts per rank.
    """
    return _sums(rows, [[[rank] for rank in destinations(ids, num_local)] for ids in topk_idx.tolist()])


def combined_expanded(rows: torch.Tensor, topk_idx: torch.Tensor, num_local: int) -> Sums:
    """Sum over a token's selections; rows [T, K, H]. A rank may round the sum of its own before it sends it."""
    by_token = []
    for ids in topk_idx.tolist():
        ranks = destinations(ids, num_local)
        by_token.append([[k for k, i in enumerate(ids) if i >= 0 and i // num_local == rank] for rank in ranks])
    return _sums(rows, by_token)


def _sums(rows: torch.Tensor, by_token: list[list[list[int]]]) -> Sums:
    """by_token[t]: the groups of indices into rows[t] that are added up first, each by itself."""
    total = torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.float64)
    partials, terms = torch.zeros_like(total), torch.zeros_like(total)
    for token, groups in enumerate(by_token):
        for indices in groups:
            group = rows[token, indices].double()
            total[token] += group.sum(dim=0)
            terms[token] += group.abs().sum(dim=0)
            if len(indices) > 1:  # a single row is sent as it is
                partials[token] += group.sum(dim=0).abs()
    return Sums(total, partials, terms)
