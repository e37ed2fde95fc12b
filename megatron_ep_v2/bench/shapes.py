"""What is dispatched: shapes by preset, even or skewed routing, and the answers that every dispatcher must give."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ep_v2.errors import SettingsError

ROUTINGS = ("balanced", "zipf", "one-hot-expert")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Of one MoE layer: hidden size, experts over all ranks, top-k, width of one expert, and of its shared experts
    together (0 = it has none); and how many such layers the model has."""

    name: str
    hidden: int
    experts: int
    topk: int
    expert_ffn: int
    layers: int = 1
    shared_ffn: int = 0


PRESETS = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 2048, 128, 8, 768, 48),
        Shape("qwen3-235b-a22b", 4096, 128, 8, 1536, 94),
        Shape("deepseek-v3", 7168, 256, 8, 2048, 61, 2048),
        Shape("mixtral", 4096, 8, 2, 14336, 32),
    )
}

TINY = Shape("tiny", 256, 8, 3, 64)  # of rehearsals


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's tokens, as Megatron's router hands them to a dispatcher.

    Attributes:
        hidden: [T, H].
        grad_output: [T, H], the gradient that comes back for the layer's output.
        topk_idx: [T, K] int64 expert ids.
        weights: [T, K] fp32, the selections' probabilities.
        routing_map: [T, E] bool.
        probs: [T, E] fp32, zero where an expert was not selected.
    """

    hidden: torch.Tensor
    grad_output: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor
    routing_map: torch.Tensor
    probs: torch.Tensor

    def expected(self, ranks: int | None = None) -> dict[str, torch.Tensor]:
        """What a layer of unweighted identity experts must give, in fp64, from this rank's tokens alone.

        Each selection brings its token back once, so output and gradient are multiplied by their number. With the
        loss sum(y * grad_output) + sum(row_probs ** 2) / 2, the gradient of a probability is the probability itself.

        Args:
            ranks: Count each rank once instead of each selection: the raw calls of the compact layout, where nothing
                adds up the selections of one rank.
        """
        copies = (
            self.routing_map if ranks is None else self.routing_map.reshape(len(self.topk_idx), ranks, -1).any(dim=2)
        )
        num_copies = copies.sum(dim=1, keepdim=True).double()
        return {
            "output": self.hidden.double() * num_copies,
            "gradient of hidden states": self.grad_output.double() * num_copies,
            "gradient of probabilities": self.probs.double(),
        }


def make_batch(
    shape: Shape,
    tokens: int,
    routing: str,
    dtype: torch.dtype,
    rank: int,
    device: torch.device,
    seed: int = 0,
    overload: tuple[float, int] | None = None,
) -> Batch:
    """A rank's tokens and their routing; another rank or seed gives others.

    balanced: every expert is equally likely, as after load balancing. zipf: expert i of a fixed shuffled order is
    selected in proportion to 1 / (i + 1). one-hot-expert: every token selects expert 0, and others evenly.

    Args:
        overload: Balanced, but the first rank receives so many times the mean, and of how many ranks.
    """
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    hidden = torch.randn(tokens, shape.hidden, generator=generator)
    grad_output = torch.randn(tokens, shape.hidden, generator=generator)
    scores = even_scores(tokens, shape.experts, generator)
    if routing == "zipf":
        order = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(seed))  # equal on all ranks
        scores = scores * (order + 1)  # the smallest of exponentials: selected in proportion to their rates
    elif routing == "one-hot-expert":
        scores[:, 0] = 0.0
    elif routing == "balanced" and overload:
        scores = overloaded(scores, shape.topk, *overload)
    elif routing != "balanced":
        raise SettingsError(
            f"unknown routing {routing!r}", needed="one of " + ", ".join(ROUTINGS), fix="check the spelling"
        )
    smallest = scores.topk(shape.topk, dim=1, largest=False, sorted=False)
    weights = torch.rand(tokens, shape.topk, generator=generator).softmax(dim=1)
    chosen = torch.zeros(tokens, shape.experts, dtype=torch.bool).scatter_(1, smallest.indices, True)
    probs = torch.zeros(tokens, shape.experts).scatter_(1, smallest.indices, weights)
    return Batch(
        hidden=hidden.to(device, dtype),
        grad_output=grad_output.to(device, dtype),
        topk_idx=smallest.indices.to(device),
        weights=weights.to(device),
        routing_map=chosen.to(device),
        probs=probs.to(device),
    )


def even_scores(tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """[T, E] fp32, exponential random numbers: as every token selects the smallest, all experts are equally likely."""
    return -torch.rand(tokens, experts, generator=generator).clamp(min=1e-9).log()


def overloaded(
    scores: torch.Tensor, topk: int, overload: float, ranks: int, hot_experts: int | None = None
) -> torch.Tensor:
    """Scale the scores of the first rank's experts, so that it is sent `overload` times the mean of the ranks, to the
    selection. The other experts stay equally likely.

    Args:
        scores: [T, E] of `even_scores`.
        topk: K, how many of the smallest a token selects.
        overload: From 1 to `most_overload`.
        hot_experts: Scale so many of the first rank's experts; None = all.

    Returns:
        [T, E] fp64.
    """
    scores, local = scores.double(), scores.shape[1] // ranks
    wanted, hot = round(overload * len(scores) * topk / ranks), min(hot_experts or local, local)
    low, high = 1e-14, 1e14  # of the factor: the smaller, the more it is sent; bisected on a logarithmic scale
    for _ in range(80):
        factor = (low * high) ** 0.5
        scaled = torch.cat((scores[:, :hot] * factor, scores[:, hot:]), dim=1)
        sent = int((scaled.topk(topk, dim=1, largest=False, sorted=False).indices < local).sum())
        if sent == wanted:
            break
        low, high = (factor, high) if sent > wanted else (low, factor)
    return scaled


def most_overload(shape: Shape, ranks: int, hot_experts: int | None = None) -> float:
    """With every selection that a token can have on one rank; or of so many of its experts, and its even share of the
    others."""
    local = shape.experts // ranks
    hot = min(hot_experts or local, local)
    others = max(0, shape.topk - hot) * (local - hot) / (shape.experts - hot) if local > hot else 0.0
    return ranks * (min(shape.topk, hot) + others) / shape.topk


def pairs_sent(topk_idx: torch.Tensor, num_experts: int, ranks: int) -> torch.Tensor:
    """How many tokens go to each rank, each counted once per rank however many of its experts it selects.

    Args:
        topk_idx: [T, K] global expert ids.

    Returns:
        [ranks] int64.
    """
    goes_to = torch.zeros(len(topk_idx), ranks, dtype=torch.bool, device=topk_idx.device)
    return goes_to.scatter_(1, topk_idx // (num_experts // ranks), True).sum(dim=0)


def wire_pairs(sent: torch.Tensor) -> int:
    """(token, rank) pairs that the busiest rank sends out in the four transfers of a forward and backward.

    Dispatch sends its tokens out, combine sends back what it received, and the backward repeats both.

    Args:
        sent: [ranks, ranks], row = from, column = to (`pairs_sent` of each rank).
    """
    others = sent - torch.diag(torch.diagonal(sent))
    return int((2 * (others.sum(dim=1) + others.sum(dim=0))).max())


def rank_load(selections_per_expert: torch.Tensor, ranks: int) -> float:
    """Selections that the busiest rank receives, as a multiple of the mean.

    Args:
        selections_per_expert: [E], over all ranks.
    """
    per_rank = selections_per_expert.double().reshape(ranks, -1).sum(dim=1)
    return float(per_rank.max() / per_rank.mean())
