"""Megatron's optimizer steps: before each, all ranks of the model read their device checks and decide together; before
the first, each looks whether its MoE layers dispatch through this package at all (`dispatchers`).

Megatron steps once per iteration on all ranks, through a ChainedOptimizer or a single optimizer, and with
`--optimizer-cuda-graph` (0.19) through a wrapper that replays the step. `install()` binds all of them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2 import device_checks, settings
from megatron_ep_v2.megatron import dispatchers
from megatron_ep_v2.megatron.symbols import GRAPHED_STEP, OPTIMIZERS, Binding

P = ParamSpec("P")
R = TypeVar("R")

_stepping = False  # inside another bound step


def bindings(modules: dict[str, ModuleType]) -> list[Binding]:
    """(class, name, our function) for each way in which Megatron steps.

    Args:
        modules: Of `symbols.find_symbols`.
    """
    names = ("ChainedOptimizer", "MixedPrecisionOptimizer", "FP32Optimizer")
    steps = [(getattr(modules[OPTIMIZERS], name), "step") for name in names]
    if GRAPHED_STEP in modules:
        steps.append((modules[GRAPHED_STEP].OptimizerCudaGraphWrapper, "__call__"))
    return [(owner, name, deciding_first(getattr(owner, name))) for owner, name in steps]


def deciding_first(step: Callable[P, R]) -> Callable[P, R]:
    """Wrap a step of Megatron to raise on every rank of the model if any rank's device check counted something."""

    @functools.wraps(step)
    def decide_and_step(*args: P.args, **kwargs: P.kwargs) -> R:
        global _stepping
        if _stepping or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return step(*args, **kwargs)
        dispatchers.check_first_step()
        read_together()
        _stepping = True
        try:
            with device_checks.read_by_caller():
                return step(*args, **kwargs)
        finally:
            _stepping = False

    return decide_and_step


def read_together() -> None:
    """Read the device checks with all ranks of the model. Every rank calls it.

    Raises:
        EPError: See `device_checks.read_all`; on every rank if one has an error.
    """
    device_checks.read_all(*_groups())


def _groups() -> tuple[ProcessGroup, ...]:
    """Groups that, reduced over in turn, reach every rank of the model. Empty if no rank can have a check, or if all
    ranks are in one expert-parallel group. Every rank returns the same."""
    from megatron.core import parallel_state

    active = settings.active()
    if not (active.sync_free or (active.reuse_recompute_handle and _may_recompute())):
        return ()
    if not parallel_state.model_parallel_is_initialized():  # the user made the process groups: see `device_checks`
        return ()
    if parallel_state.get_expert_tensor_and_model_parallel_group().size() == dist.get_world_size():
        return ()
    groups = (
        parallel_state.get_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    return tuple(group for group in groups if group.size() > 1)


def _may_recompute() -> bool:
    """Whether Megatron's arguments turn recompute on; True outside its training loop, where that is unknown.

    Other recompute inside that loop (torch's checkpoint with `Replayed`) is not detected: then only the ranks of one
    expert-parallel group decide together, unless the loop calls `device_checks.read_all(WORLD)`.
    """
    args = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
    return args is None or bool(getattr(args, "recompute_granularity", None))
