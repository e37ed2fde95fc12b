"""The top-k kernels against numpy's stable sort: in Triton's interpreter on a CPU, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

SIZES = [(1, 8, 2), (37, 128, 8), (20, 256, 8), (9, 100, 3), (5, 6, 6), (3, 2050, 16), (0, 8, 2)]  # tokens, experts, K


def cases(seed: int = 0) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Name, dense [T, E] fp32, K."""
    generator = torch.Generator().manual_seed(seed)
    for tokens, experts, topk in SIZES:
        scores = torch.randn(tokens, experts, generator=generator)
        yield f"any numbers, {tokens} x {experts}", scores, topk
        chosen = scores.argsort(dim=1)[:, :topk]
        yield f"a router's, {tokens} x {experts}", torch.zeros_like(scores).scatter(1, chosen, scores.softmax(1)), topk
    inf = float("inf")
    odd = [[0.0] * 8, [-0.0] * 8, [-inf] * 8, [inf, 1e-45, 0, -1e-45, -inf, 3.4e38, -3.4e38, 1], [float("nan"), 1] * 4]
    yield "odd numbers", torch.tensor(odd), 3
    yield "the smallest numbers are not 0", torch.tensor([[0.0, 1e-45, 0.0, 0.0], [-1e-45, -1.0, -0.0, -2.0]]), 3
    yield "capacity dropped most", torch.tensor([[0, 0.5, 0, 0], [0, 0, 0, 0], [0.1, 0, 0, 0.2]]), 3


def selected_by_sort(probs: torch.Tensor, topk: int) -> torch.Tensor:
    """[T, K] columns of the largest entries, the largest first, of equals that of the lowest column."""
    # Infinity below NaN, which counts as the largest.
    keys = np.where(np.isnan(probs.numpy()), np.finfo(np.float64).max, np.clip(probs.double().numpy(), -1e300, 1e300))
    return torch.from_numpy(np.argsort(-keys, axis=1, kind="stable")[:, :topk].copy())


def wrong(kernels: Any, device: str) -> list[str]:
    """Names of cases in which `select` or `spread` differs. Values of 0 have no column; their gradient goes nowhere."""
    found = []
    for name, probs, topk in cases():
        values, indices = kernels.select(probs.to(device), topk)
        columns = selected_by_sort(probs, topk)
        taken = np.take_along_axis(probs.numpy(), columns.numpy(), axis=1)
        expected = columns.numpy().copy()
        expected[taken == 0] = -1
        same = indices.dtype == torch.int64 and np.array_equal(indices.cpu().numpy(), expected)
        bits = np.array_equal(values.cpu().numpy().view(np.int32), taken.view(np.int32))
        grad = torch.arange(1.0, 1 + values.numel()).view(values.shape)
        back = kernels.spread(grad.to(device), indices, probs.shape[1])
        dense = np.zeros(probs.shape, dtype=np.float32)
        for row, k in zip(*np.nonzero(expected >= 0), strict=True):
            dense[row, expected[row, k]] = grad[row, k]
        found += [name] * (not (same and bits and np.array_equal(back.cpu().numpy(), dense)))
    return found
