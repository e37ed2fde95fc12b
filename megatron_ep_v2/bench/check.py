"""Right results first: what is compared before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from megatron_ep_v2.bench.timing import slowest_rank
from megatron_ep_v2.errors import EPError

Tensors = Mapping[str, torch.Tensor] | Iterable[torch.Tensor] | torch.Tensor
K = TypeVar("K")


class WrongResultError(EPError):
    """A case of a benchmark computes something else than it should: it gets no time. Every rank meets this alike."""


def relative_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in fp64; infinite where `found` has a NaN, or differs from zeros."""
    expected = expected.double()
    distance, norm = (found.double() - expected).norm(), expected.norm()
    error = float(distance / norm) if norm else (0.0 if distance == 0 else math.inf)
    return math.inf if math.isnan(error) else error


def errors(found: Tensors, expected: Tensors) -> dict[str, float]:
    """`relative_l2` of each tensor that is expected, by its name or number."""
    ours, theirs = _named(found), _named(expected)
    return {name: relative_l2(ours[name], tensor) for name, tensor in theirs.items()}


def require_equal(
    results: Mapping[K, Tensors], expected: Tensors, tolerance: float, device: torch.device
) -> dict[K, float]:
    """The largest relative L2 of each case, of any tensor and any rank; collective.

    Args:
        results: What each case has computed, by its name.
        expected: What all of them should have.
        tolerance: The largest relative L2 that is right.
        device: Of the ranks' collectives.

    Raises:
        WrongResultError: A case is wrong.
    """
    by_case = {case: errors(found, expected) for case, found in results.items()}
    worst = dict(zip(by_case, slowest_rank([max(values.values()) for values in by_case.values()], device), strict=True))
    wrong = {case: error for case, error in worst.items() if not error <= tolerance}
    if wrong:
        raise WrongResultError(
            "WRONG RESULT, not timed: " + ", ".join(str(case) for case in wrong),
            found=", ".join(f"{case}: relative L2 {error:.1e}{_here(by_case[case])}" for case, error in wrong.items()),
            needed=f"at most {tolerance:.1e}",
        )
    return worst


def _here(by_tensor: Mapping[str, float]) -> str:
    """This rank's values."""
    return " (here " + ", ".join(f"{name} {error:.1e}" for name, error in by_tensor.items()) + ")"


def _named(tensors: Tensors) -> dict[str, torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        return {"output": tensors}
    if isinstance(tensors, Mapping):
        return dict(tensors)
    return {str(i): tensor for i, tensor in enumerate(tensors)}
