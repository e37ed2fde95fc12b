"""What must come out, computed the plain way: loops over ranks, tokens and picks, sums in fp64.

Nothing here is shared with the package: an expected value that came from the code under test would prove nothing.

deep_ep does not fix the order of received rows, nor of the rows of one expert. So the oracle speaks of *which* rows
arrive, by (source rank, token, pick); where they lie is read from `handle.recv_src_metadata` by whoever compares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Pick = tuple[int, int, int]  # source rank, token, place among the token's picks


@dataclass(frozen=True)
class Arrival:
    """What one rank receives.

    Attributes:
        rows: (source rank, token) -> the local expert of each pick, -1 where the pick is not this rank's. In order.
        experts: For each local expert the picks that it serves, ordered by source rank and token.
        counts, padded: Rows of each local expert, without and with padding.
        psum_rows: Running sum of the rows by source rank.
        psum_padded: Running sum of `padded`.
        real_ends: Where each expert's real rows end in the expanded layout.
    """

    rows: dict[tuple[int, int], list[int]]
    experts: list[list[Pick]]
    counts: list[int]
    padded: list[int]
    psum_rows: list[int]
    psum_padded: list[int]
    real_ends: list[int]

    def expanded_order(self) -> list[Pick | None]:
        """The rows of the expanded layout ordered by expert, source rank and token; None is padding."""
        order: list[Pick | None] = []
        for picks, padded in zip(self.experts, self.padded):
            order += picks
            order += [None] * (padded - len(picks))
        return order


def arrival(picks_by_rank: list[torch.Tensor], rank: int, num_experts: int, alignment: int) -> Arrival:
    """What `rank` receives when rank r dispatches tokens with the picks `picks_by_rank[r]` [T, K]."""
    num_local = num_experts // len(picks_by_rank)
    rows: dict[tuple[int, int], list[int]] = {}
    experts: list[list[Pick]] = [[] for _ in range(num_local)]
    psum_rows = []
    for source, picks in enumerate(picks_by_rank):
        for token, ids in enumerate(picks.tolist()):
            local = [i - rank * num_local if i >= 0 and i // num_local == rank else -1 for i in ids]
            if any(expert >= 0 for expert in local):
                rows[source, token] = local
            for place, expert in enumerate(local):
                if expert >= 0:
                    experts[expert].append((source, token, place))
        psum_rows.append(len(rows))

    counts = [len(picks) for picks in experts]
    padded = [-(-count // alignment) * alignment for count in counts]
    psum_padded = [sum(padded[: i + 1]) for i in range(num_local)]
    real_ends = [sum(padded[:i]) + counts[i] for i in range(num_local)]
    return Arrival(rows, experts, counts, padded, psum_rows, psum_padded, real_ends)


def destinations(ids: list[int], num_local: int) -> list[int]:
    """The ranks that a token with these picks is sent to, without repetition."""
    return sorted({i // num_local for i in ids if i >= 0})


@dataclass(frozen=True)
class Sums:
    """Exact sums [T, H] in fp64, and what bounds the rounding errors of whoever adds up in a lower precision.

    Attributes:
        total: The sums.
        partials: Sum of the magnitudes of what may be rounded to the payload's dtype on the way.
        terms: Sum of the magnitudes of all terms.
    """

    total: torch.Tensor
    partials: torch.Tensor
    terms: torch.Tensor


def combined_compact(rows: torch.Tensor, picks: torch.Tensor, num_local: int) -> Sums:
    """Sum over the ranks that a token went to.

    Args:
        rows: [T, ranks, H], what each rank returns for each of this rank's tokens.
        picks: [T, K].
        num_local: Experts per rank.
    """
    return _sums(rows, [[[rank] for rank in destinations(ids, num_local)] for ids in picks.tolist()])


def combined_expanded(rows: torch.Tensor, picks: torch.Tensor, num_local: int) -> Sums:
    """Sum over a token's picks; rows [T, K, H]. A rank may round the sum of its own picks before it sends it."""
    by_token = []
    for ids in picks.tolist():
        ranks = destinations(ids, num_local)
        by_token.append([[k for k, i in enumerate(ids) if i >= 0 and i // num_local == rank] for rank in ranks])
    return _sums(rows, by_token)


def _sums(rows: torch.Tensor, by_token: list[list[list[int]]]) -> Sums:
    """by_token[t]: the groups of places of rows[t] that are added up first, each by itself."""
    total = torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.float64)
    partials, terms = torch.zeros_like(total), torch.zeros_like(total)
    for token, groups in enumerate(by_token):
        for places in groups:
            group = rows[token, places].double()
            total[token] += group.sum(dim=0)
            terms[token] += group.abs().sum(dim=0)
            if len(places) > 1:  # a single row is sent as it is
                partials[token] += group.sum(dim=0).abs()
    return Sums(total, partials, terms)


@dataclass(frozen=True)
class Experts:
    """SwiGLU experts: gate and up [E, H, F], down [E, F, H]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.gate, self.up, self.down

    def run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert on rows [N, H]."""
        return (torch.nn.functional.silu(x @ self.gate[expert]) * (x @ self.up[expert])) @ self.down[expert]


def make_experts(num_experts: int, hidden: int, ffn: int, seed: int = 7) -> Experts:
    """Random experts in fp64, scaled so that outputs are of the size of the inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(num_experts, rows, columns, generator=generator, dtype=torch.float64) / rows**0.5

    return Experts(normal(hidden, ffn), normal(hidden, ffn), normal(ffn, hidden))


@dataclass(frozen=True)
class Dense:
    """A dense MoE layer and its gradients: one entry per rank, `experts` for all of them."""

    output: list[torch.Tensor]
    grad_x: list[torch.Tensor]
    grad_probs: list[torch.Tensor]
    grad_experts: Experts


def dense_moe(
    x: list[torch.Tensor],
    picks: list[torch.Tensor],
    probs: list[torch.Tensor],
    experts: Experts,
    grad_output: list[torch.Tensor],
) -> Dense:
    """out[t] = sum over picks of probs[t, k] * expert[picks[t, k]](x[t]); gradients of sum(out * grad_output).

    Each list has one entry per rank: x [T, H], picks [T, K], probs [T, K], grad_output [T, H]. All in fp64.
    """
    x = [rows.double().clone().requires_grad_() for rows in x]
    probs = [weights.double().clone().requires_grad_() for weights in probs]
    experts = Experts(*(tensor.double().clone().requires_grad_() for tensor in experts.tensors()))

    output = []
    for rows, rank_picks, weights in zip(x, picks, probs):
        sums = [0 * row for row in rows]
        for token, ids in enumerate(rank_picks.tolist()):
            for place, expert in enumerate(ids):
                if expert >= 0:
                    sums[token] = sums[token] + weights[token, place] * experts.run(expert, rows[token])
        output.append(torch.stack(sums) if sums else 0 * rows)

    objective = sum((out * grad.double()).sum() for out, grad in zip(output, grad_output))
    leaves = [*x, *probs, *experts.tensors()]
    grads = torch.autograd.grad(objective, leaves, allow_unused=True)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)]
    ranks = len(x)
    return Dense(
        output=[out.detach() for out in output],
        grad_x=grads[:ranks],
        grad_probs=grads[ranks : 2 * ranks],
        grad_experts=Experts(*grads[2 * ranks :]),
    )
