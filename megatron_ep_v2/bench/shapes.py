"""Input of the dispatchers: preset shapes, even or skewed routing, and the expected results."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ep_v2.errors import SettingsError

ROUTINGS = ("balanced", "zipf", "one-hot-expert")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Shape of a MoE layer: hidden size, experts over all ranks, selections per token, width of an expert; and the
    number of such layers in the model."""

    name: str
    hidden: int
    experts: int
    topk: int
    expert_ffn: int
    layers: int = 1


PRESETS = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 2048, 128, 8, 768, 48),
        Shape("qwen3-235b-a22b", 4096, 128, 8, 1536, 94),
        Shape("deepseek-v3", 7168, 256, 8, 2048, 61),
        Shape("mixtral", 4096, 8, 2, 14336, 32),
    )
}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's tokens, as Megatron's router passes them to a dispatcher.

    Attributes:
        hidden: [T, H].
        grad_output: [T, H], the gradient of the layer's output.
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
        """Expected results of a layer of unweighted identity experts, in fp64, from this rank's tokens only.

        Each selection returns its token once, so output and gradient are multiplied by the number of selections. With
        the loss sum(y * grad_output) + sum(row_probs ** 2) / 2, the gradient of a probability is the probability
        itself.

        Args:
            ranks: Count each rank once instead of each selection, for the raw calls of the compact layout, in which no
                experts sum the selections of one rank.
        """
        copies = self.routing_map
        if ranks is not None:
            copies = copies.reshape(len(self.topk_idx), ranks, -1).any(dim=2)
        num_copies = copies.sum(dim=1, keepdim=True).double()
        return {
            "output": self.hidden.double() * num_copies,
            "gradient of hidden states": self.grad_output.double() * num_copies,
            "gradient of probabilities": self.probs.double(),
        }


def make_batch(
    shape: Shape, tokens: int, routing: str, dtype: torch.dtype, rank: int, device: torch.device, seed: int = 0
) -> Batch:
    """Make a rank's tokens and their routing; they depend on rank and seed.

    balanced: every expert is equally likely, as after load balancing. zipf: expert i of a fixed shuffled order is
    selected in proportion to 1 / (i + 1). one-hot-expert: every token selects expert 0, and the others evenly.
    """
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    hidden = torch.randn(tokens, shape.hidden, generator=generator)
    grad_output = torch.randn(tokens, shape.hidden, generator=generator)
    scores = -torch.rand(tokens, shape.experts, generator=generator).clamp(min=1e-9).log()  # exponential
    if routing == "zipf":
        order = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(seed))  # equal on all ranks
        scores = scores * (order + 1)  # the smallest of exponentials: selected in proportion to their rates
    elif routing == "one-hot-expert":
        scores[:, 0] = 0.0
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


def pairs_sent(topk_idx: torch.Tensor, num_experts: int, ranks: int) -> torch.Tensor:
    """Number of tokens sent to each rank; a token counts once per rank, even if it selects several of its experts.

    Args:
        topk_idx: [T, K] global expert ids.

    Returns:
        [ranks] int64.
    """
    goes_to = torch.zeros(len(topk_idx), ranks, dtype=torch.bool, device=topk_idx.device)
    return goes_to.scatter_(1, topk_idx // (num_experts // ranks), True).sum(dim=0)


def wire_pairs(sent: torch.Tensor) -> int:
    """(token, rank) pairs that the busiest rank sends in the four transfers of a forward and backward.

    Dispatch sends its tokens, combine returns the received rows, and the backward repeats both.

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
