"""The guard of a recomputed dispatch: it repeats the first routing, and says where the router did not.

A forward that does not repeat bit by bit (atomic adds, several layers in one checkpoint) may swap two experts of nearly
equal probability. Such near ties are counted and a warning says how many; the probability of the expert that came
stands for the one that went. More than that is a changed routing: before the optimizer's step, every rank raises (see
`deferred`).
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from megatron_ep_v2.deferred import DeviceCheck
from megatron_ep_v2.errors import RoutingChangedError
from megatron_ep_v2.kernels import replay

logger = logging.getLogger("megatron_ep_v2")

# A selection that changed is a near tie where the probabilities of the two experts differ by less than this part of the
# first one's: rounding to bf16, 2**-9 of a value, moves a logit of size 10 by 0.02, and its probability by 2 %.
NEAR = 1 / 16
# The routing has changed where more of a dispatch's selections than this part have changed: in all, and by more than a
# near tie. (Routers with a bias or with groups of experts select by other numbers than the probabilities.)
MOST_CHANGED, MOST_FAR = 1 / 4, 1 / 64

# By buffer: selections of changed routings, and of near ties.
_checks: weakref.WeakKeyDictionary[Any, tuple[DeviceCheck, DeviceCheck]] = weakref.WeakKeyDictionary()


def as_first(first: Any, topk_idx: torch.Tensor, topk_weights: torch.Tensor, buffer: Any) -> torch.Tensor:
    """In a second run: its own probabilities for the selections of the first. Changed selections are counted on the
    device, with no host wait.

    Args:
        first: The handle of the first run's dispatch, with its `topk_weights` (see `recompute.note`).
        topk_idx: [T, K] int64, what this run selects, in any order.
        topk_weights: [T, K], its probabilities.
        buffer: Of the handle.

    Returns:
        [T, K], in the first run's columns. An expert that this run does not select has the mean of the probabilities of
        those that it selects instead.

    Raises:
        RoutingChangedError: On every rank of the group, before the optimizer's step.
    """
    wanted = first.topk_idx
    if topk_idx.shape != wanted.shape:
        return topk_weights  # the buffer says what is wrong
    if buffer not in _checks:
        device = topk_idx.device
        _checks[buffer] = (
            DeviceCheck(_routing_changed, device, buffer.group),
            DeviceCheck(_near_ties(), device, buffer.group),
        )
    another, ties = _checks[buffer]
    number = topk_idx.numel()
    weights: torch.Tensor = _kernels(topk_weights).follow(
        *(wanted, first.topk_weights, topk_idx, topk_weights),
        *(NEAR, int(MOST_FAR * number), int(MOST_CHANGED * number), another.count, ties.count),
    )
    another.touch()
    ties.touch()
    return weights


def grad_of_own(wanted: torch.Tensor, topk_idx: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of `topk_weights` in `as_first`: [T, K].

    Args:
        wanted: [T, K], the first run's selections.
        topk_idx: [T, K], this run's.
        grad: [T, K], of what `as_first` returned.
    """
    own: torch.Tensor = _kernels(grad).back(wanted, topk_idx, grad.contiguous())
    return own


def _kernels(weights: torch.Tensor) -> ModuleType:
    """Triton's for fp32 on CUDA devices; else PyTorch."""
    return _triton() or replay if weights.is_cuda and weights.dtype == torch.float32 else replay


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from megatron_ep_v2.kernels import replay_triton
    except ImportError as error:
        logger.warning("PyTorch compares recomputed routings, more slowly than Triton 3.3 would: %s", error)
        return None
    return replay_triton


def _near_ties() -> Callable[[dict[int, int]], None]:
    """Warns at the first near ties of a buffer, and whenever there are ten times as many as at the last warning."""
    total, next_warning = 0, 1

    def warn(selections: dict[int, int]) -> None:
        nonlocal total, next_warning
        total += sum(selections.values())
        if total >= next_warning:
            next_warning = 10 * total
            logger.warning(
                "recompute: %d selections so far were other experts than in the first forward, as in near ties; the "
                "first forward's were used. The forward does not repeat bit by bit (atomic adds, several layers in one "
                "checkpoint). MCORE_DEEPEP_V2_DETERMINISTIC=1 makes this package's part repeat",
                total,
            )

    return warn


def _routing_changed(selections: dict[int, int]) -> RoutingChangedError:
    return RoutingChangedError(
        f"the recomputed forward chose other experts than the first on rank(s) {sorted(selections)} of the group",
        found=f"selections that differ, by rank: {selections}, too many or too far apart for near ties",
        needed="the same selections, because a recomputed dispatch repeats the routing of the first",
        fix="compare what the router gets in the two forwards of one checkpoint: a state that has changed, a generator "
        "that the checkpoint does not restore, a layer that does not repeat; or set "
        "MCORE_DEEPEP_V2_REUSE_RECOMPUTE_HANDLE=off, and each run keeps a routing of its own",
    )
