"""Recomputed routings compared in plain loops, for the kernels that do it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

NEAR = 1 / 16


def cases(seed: int = 0) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Name, first selections [T, K], their probabilities, the recomputed ones in other columns, theirs."""
    generator = torch.Generator().manual_seed(seed)
    for tokens, experts, topk in ((1, 4, 2), (37, 32, 8), (50, 16, 3), (3, 64, 32), (0, 8, 2)):
        scores = torch.rand(tokens, experts, generator=generator)
        for name, noise in (("the same", 0.0), ("near ties", 0.01), ("another", 1.0)):
            again = scores + noise * torch.rand(tokens, experts, generator=generator)
            (before, first), (weights, idx) = (each.topk(topk, dim=1) for each in (scores, again))
            order = torch.rand(tokens, topk, generator=generator).argsort(dim=1)
            idx, weights = idx.gather(1, order), weights.gather(1, order)
            first, before, idx, weights = first.clone(), before.clone(), idx.clone(), weights.clone()
            for ids, probs in ((first, before), (idx, weights)):
                dropped = probs < 0.5
                ids[dropped], probs[dropped] = -1, 0.0
            yield f"{name}, {tokens} x {topk} of {experts}", first, before, idx, weights


def expected(first: Any, before: Any, idx: Any, weights: Any) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Weights in the first's columns [T, K]; [T, K, K] how each depends on each of `weights`; changed selections, and
    those that are no near ties."""
    tokens, topk = first.shape
    moved, depends = torch.zeros(tokens, topk), torch.zeros(tokens, topk, topk)
    changed = far = 0
    for t in range(tokens):
        ours, theirs = idx[t].tolist(), first[t].tolist()
        new = [j for j in range(topk) if ours[j] not in theirs]
        for k in range(topk):
            columns = [j for j in range(topk) if ours[j] == theirs[k]]
            if not columns:
                changed += 1
                close = [abs(float(weights[t, j]) - float(before[t, k])) <= NEAR * float(before[t, k]) for j in new]
                far += not any(close)
            for j in columns or new:
                depends[t, k, j] = 1 if columns else 1 / len(new)
            moved[t, k] = (depends[t, k] * weights[t]).sum()
    return moved, depends, changed, far


def wrong(kernels: Any, device: str) -> list[str]:
    """Names of cases in which `follow` or `back` differs."""
    found = []
    for name, first, before, idx, weights in cases():
        moved, depends, changed, far = expected(first, before, idx, weights)
        on = [each.to(device) for each in (first, before, idx, weights)]
        counts = []
        for most_far, most_changed in ((far, changed), (max(far - 1, 0), changed), (far, max(changed - 1, 0))):
            another, ties = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
            sent = kernels.follow(*on, NEAR, most_far, most_changed, another, ties)
            counts.append((int(another), int(ties)))
        wanted = [(0, changed), (changed, 0) if far else (0, changed), (changed, 0) if changed else (0, 0)]
        grad = torch.rand(weights.shape, generator=torch.Generator().manual_seed(1))
        back = kernels.back(on[0], on[2], grad.to(device)).cpu()
        good = torch.allclose(sent.cpu(), moved, rtol=1e-6) and counts == wanted
        # Of a selection that is dropped in both runs, no gradient is read.
        kept = idx >= 0
        wanted_back = (depends * grad[:, :, None]).sum(1)
        found += [name] * (not (good and torch.allclose(back[kept], wanted_back[kept], rtol=1e-5)))
    return found
