"""Megatron-Core's side of `install()`, and stand-ins for deep_ep, for tests that bind the one to the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, optimizer
from megatron.core.optimizer import muon
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.resharding import planner
from megatron.core.resharding import utils as resharding
from megatron.core.tensor_parallel.random import CheckpointFunction
from megatron.core.transformer.moe import fused_a2a, token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_ep_v2 import settings
from megatron_ep_v2.generations import PACKAGES
from megatron_ep_v2.megatron import binding, optimizer_step
from megatron_ep_v2.megatron.symbols import MANAGER as MANAGER_NAME
from megatron_ep_v2.megatron.symbols import SCHEDULE, find_symbols
from megatron_ep_v2.probe import probe

FOUND = find_symbols()[1]
SCHEDULE_MODULE = FOUND[SCHEDULE]
MODULES = (fused_a2a, token_dispatcher, dist, dist.distributed_c10d, SCHEDULE_MODULE, dist_checkpointing)
MODULES += (optimizer, muon, planner, resharding)
MANAGER = getattr(token_dispatcher, MANAGER_NAME)  # Megatron's own, taken before any test runs
FLEX = token_dispatcher.MoEFlexTokenDispatcher
STEPS = tuple((owner, name) for owner, name, _ in optimizer_step.bindings(FOUND))  # imports what has them
CLASSES = (MANAGER, FLEX, token_dispatcher.MoETokenDispatcher, CheckpointFunction, DistributedOptimizer, MoELayer)
CLASSES += tuple(owner for owner, _ in STEPS)
CALLS = ("fused_dispatch", "fused_combine", "set_deepep_num_sms")  # that both modules hold


def names() -> dict[tuple[str, str], Any]:
    """Everything that the modules hold, which `install()` may bind in, and what Megatron's classes hold."""
    held = {(module.__name__, name): value for module in MODULES for name, value in vars(module).items()}
    return held | {(cls.__name__, name): value for cls in CLASSES for name, value in vars(cls).items()}


def rebound(before: dict[tuple[str, str], Any]) -> set[tuple[str, str]]:
    """What is no longer the same object: (the module's last name, name)."""
    now, gone = names(), object()
    different = {key for key in before | now if before.get(key, gone) is not now.get(key, gone)}
    return {(module.rpartition(".")[2], name) for module, name in different}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No installation, no settings, no deep_ep and no CUDA, whatever this machine has; undone at the end."""
    for name in settings.NAMES:
        monkeypatch.delenv(settings.variable(name), raising=False)
    binding.uninstall()
    megatrons_own = [(module, dict(vars(module))) for module in MODULES]
    set_cuda(monkeypatch, False)
    for package in PACKAGES:
        set_deep_ep(monkeypatch, package=package)
    yield monkeypatch
    binding.uninstall()
    monkeypatch.undo()
    probe.cache_clear()
    for module, held in megatrons_own:
        vars(module).update(held)


def set_cuda(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    probe.cache_clear()


def set_deep_ep(
    monkeypatch: pytest.MonkeyPatch,
    *buffers: str,
    version: str = "2.1.0",
    package: str = "deep_ep",
    zero_padding: bool = True,
) -> None:
    """A package of DeepEP with these classes; with none, its import finds nothing.

    Args:
        package: Its import name; the others stay as they are.
        zero_padding: Whether their dispatch takes do_zero_padding, which 2.0 does not.
    """

    def dispatch(self: Any, x: Any, do_expand: bool = False, do_zero_padding: bool = False) -> None: ...

    def dispatch_of_2_0(self: Any, x: Any, do_expand: bool = False) -> None: ...

    module: Any = ModuleType(package) if buffers else None
    if buffers:
        module.__version__ = version
        for name in buffers:
            setattr(module, name, type(name, (), {"dispatch": dispatch if zero_padding else dispatch_of_2_0}))
    monkeypatch.setitem(sys.modules, package, module)
    probe.cache_clear()
