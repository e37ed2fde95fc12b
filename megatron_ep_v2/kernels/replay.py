"""Reorders the probabilities of a recomputed routing to the columns of the first one, and counts changed selections.

PyTorch, for every device; `replay_triton` does the same on CUDA tensors in a few launches. Letters: T tokens, K
selections per token.
"""

from __future__ import annotations

import torch


def follow(
    wanted: torch.Tensor,
    before: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    near: float,
    most_far: int,
    most_changed: int,
    another: torch.Tensor,
    ties: torch.Tensor,
) -> torch.Tensor:
    """Reorder probabilities, and add the number of changed selections to `another` or `ties`.

    Args:
        wanted: [T, K] int64, the first routing.
        before: [T, K], its probabilities.
        idx: [T, K] int64, the recomputed routing, in any order.
        weights: [T, K], its probabilities.
        near: Relative difference of probabilities up to which a change is a near tie.
        most_far, most_changed: Limits of changed selections that are no near ties, and of all changed selections, above
            which it is another routing.
        another, ties: [1] int32. Changed selections are added to `another` if it is another routing, else to `ties`.

    Returns:
        [T, K] in weights' dtype. For an expert of `wanted` that is not in `idx`: the mean of the token's new experts.
    """
    same, gone, new = _compare(wanted, idx)
    moved = torch.where(same, weights[:, None, :], 0).sum(dim=2)
    instead = torch.where(new, weights, 0).sum(dim=1) / new.sum(dim=1).clamp(min=1)
    close = (weights[:, None, :] - before[:, :, None]).abs() <= near * before[:, :, None]
    is_near = (gone[:, :, None] & new[:, None, :] & close).any(dim=2)
    changed, far = gone.sum(dtype=torch.int32), (gone & ~is_near).sum(dtype=torch.int32)
    is_another = (far > most_far) | (changed > most_changed)
    another += changed * is_another
    ties += changed * ~is_another
    return torch.where(gone, instead[:, None], moved)


def back(wanted: torch.Tensor, idx: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradient of `weights` in `follow`. grad: [T, K], of its result."""
    same, gone, new = _compare(wanted, idx)
    moved = torch.where(same, grad[:, :, None], 0).sum(dim=1)
    share = torch.where(gone, grad, 0).sum(dim=1) / new.sum(dim=1).clamp(min=1)
    return torch.where(new, share[:, None], moved)


def _compare(wanted: torch.Tensor, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equal selections [T, K of wanted, K of idx]; those only in `wanted` [T, K]; those only in `idx` [T, K]."""
    same = wanted[:, :, None] == idx[:, None, :]
    return same, ~same.any(dim=2), ~same.any(dim=1)
