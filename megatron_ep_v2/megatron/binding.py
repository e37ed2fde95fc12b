"""Bind this package to an installed Megatron-Core, all names or none, and undo it.

Megatron's `token_dispatcher` imports `fused_dispatch` and its kin by name, so they are bound there as well as in
`fused_a2a`. Nothing in Megatron is edited, and `uninstall()` restores only what is still ours.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep_v2 import fused_a2a, recompute
from megatron_ep_v2 import settings as settings_module
from megatron_ep_v2.buffers import capacity, pool
from megatron_ep_v2.buffers.carriers import CARRIERS, MEGATRONS_OWN, REFERENCE
from megatron_ep_v2.errors import SeamError, SettingsError
from megatron_ep_v2.experts.gemm import gemm
from megatron_ep_v2.megatron import optimizer_step
from megatron_ep_v2.megatron.symbols import (
    DIST_CHECKPOINTING,
    FUSED_A2A,
    MANAGER,
    MOE_LAYER,
    OPTIMIZER,
    SCHEDULE,
    TOKEN_DISPATCHER,
    checkpoints,
    find_experts_seam,
    find_seam,
)
from megatron_ep_v2.probe import Choice, choose, probe

logger = logging.getLogger("megatron_ep_v2")


@dataclass
class _Installation:
    """What `install()` did."""

    choice: Choice
    layout: str
    layout_reason: str
    experts: str
    experts_reason: str
    megatron_version: str
    bound: list[tuple[Any, str, Any, Any]] = field(default_factory=list)  # module or class, name, theirs, ours


_installation: _Installation | None = None


def install(**explicit: Any) -> dict[str, Any]:
    """Make Megatron-Core's flex token dispatcher (backend "deepep") run on this package. Call it before the model is
    built. A second call without arguments changes nothing; with arguments, it replaces the first (and if it fails then,
    Megatron is as it was before both). Models that are alive then go on: what Megatron's configuration decided for them
    holds, unless it is given a value now; but a layer that was built for another layout or other experts raises a
    SettingsError before it dispatches.

    With only the legacy deep_ep installed, Megatron's own dispatcher is left exactly as it is, and the log says so.
    Other experts than Megatron's are bound whatever carries the tokens.

    Args:
        **explicit: Settings by name (see `settings.Settings`): buffer, layout, num_max_tokens_per_rank, num_sms, ...

    Returns:
        `status()`.

    Raises: (in each case nothing in Megatron was changed)
        SettingsError: A setting cannot be used.
        UnavailableError: No buffer can be used here.
        SeamError: Megatron-Core is missing, or a name or signature is not the expected one.
    """
    global _installation
    if _installation is not None and not explicit:
        return status()
    settings = settings_module.resolve(**explicit)
    if _installation is not None and _has_layers():
        settings = settings_module.keep_offers(settings, settings_module.active())
    choice = choose(probe(), settings)
    layout, layout_reason = _choose_layout(settings, choice)
    _check_experts(settings)
    uninstall()  # before the seam is looked at: it must be Megatron's own
    version, modules = find_seam()

    experts_reason = f"asked for by {settings.source('experts')}" if settings.experts != "megatron" else "default"
    installation = _Installation(choice, layout, layout_reason, settings.experts, experts_reason, version)
    bindings = []
    if choice.kind != "megatron":
        bindings += _bindings(modules, layout, settings.experts)
    if choice.kind != "megatron" or settings.experts != "megatron":
        bindings += _bindings_of_experts(version, settings.experts)
    settings_module.activate(settings)
    for owner, name, ours in bindings:
        _bind(installation, owner, name, ours)
    if choice.kind != "megatron":
        pool.set_expected_tokens(capacity.expected)
    _installation = installation
    found = probe()
    logger.info("HAVE_DEEP_EP=%s HAVE_DEEP_EP_V2=%s; %s", found.have_deep_ep, found.have_deep_ep_v2, found.describe())
    # Where nobody asked for less than DeepEP V2 and nobody gets it, the log shows it even to who did not set it up.
    second_best = choice.kind in ("megatron", REFERENCE) and settings.buffer == "auto"
    level = logging.WARNING if second_best and settings_module.is_first_rank() else logging.INFO
    logger.log(level, "megatron-core %s: %s", version, _sentence(installation))
    return status()


def uninstall() -> None:
    """Destroy the buffers and give Megatron its own names back, except where somebody else has rebound them since. A
    layer that is alive raises a ClosedError before it dispatches, until the same is installed again."""
    global _installation
    pool.destroy_buffers()
    pool.set_expected_tokens(None)
    settings_module.activate(None)
    if _installation is None:
        return
    for module, name, theirs, ours in reversed(_installation.bound):
        if inspect.getattr_static(module, name, None) is ours:
            setattr(module, name, theirs)
        else:
            logger.warning("%s.%s was rebound after install(); left as it is", module.__name__, name)
    _installation = None


def moe_submodules(submodules: Any) -> Any:
    """`install()`, and Megatron's MoESubmodules with the experts that are installed. For a patched Megatron, whose
    first MoE layer is being built when `install()` binds what builds them.

    Raises:
        EPError: See `install` and `megatron.experts.with_experts`.
    """
    install()
    assert _installation is not None
    if _installation.experts == "megatron":
        return submodules
    from megatron_ep_v2.megatron.experts import with_experts

    return with_experts(submodules, _installation.experts)


def bound() -> list[tuple[Any, str, Any, Any]]:
    """What is bound now: module or class, name, Megatron's object, ours. For who changes between several."""
    return list(_installation.bound) if _installation else []


def status() -> dict[str, Any]:
    """What is installed and active, as plain JSON-able values."""
    found = probe()
    report: dict[str, Any] = {
        "installed": _installation is not None,
        "have_deep_ep": found.have_deep_ep,
        "have_deep_ep_v2": found.have_deep_ep_v2,
        "deep_ep": found.describe(),
        "settings": settings_module.active().describe(),
        "buffers": [pool.describe(buffer, settings_module.active()) for buffer in pool.buffers()],
    }
    if _installation is not None:
        report |= {
            "megatron_core": _installation.megatron_version,
            "buffer": _installation.choice.kind,
            "buffer_reason": _installation.choice.reason,
            "layout": _installation.layout,
            "layout_reason": _installation.layout_reason,
            "experts": _installation.experts,
            "experts_reason": _installation.experts_reason,
        }
    return report


def _sentence(installation: _Installation) -> str:
    experts = f"{installation.experts} experts ({installation.experts_reason})"
    if installation.choice.kind == "megatron":
        what = "nothing" if installation.experts == "megatron" else "nothing in the dispatcher"
        return f"{what} was changed ({installation.choice.reason}); {experts}"
    return (
        "flex dispatcher (backend deepep) bound to "
        f"the {installation.choice.kind} buffer ({installation.choice.reason}), "
        f"{installation.layout} layout ({installation.layout_reason}), {experts}"
    )


def _check_experts(settings: settings_module.Settings) -> None:
    """
    Raises:
        UnavailableError: These experts cannot run here.
        SettingsError: They wait on the host, and sync-free mode does not.
    """
    if settings.experts == "megatron":
        return
    gemm(settings.experts).require(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if settings.sync_free and settings.experts == "sequential":
        raise SettingsError(
            "sequential experts wait for the counts that sync-free mode leaves on the device",
            found=f"experts=sequential from {settings.source('experts')}, "
            f"sync_free from {settings.source('sync_free')}",
            needed="experts=grouped, or deepgemm",
            fix="set MCORE_DEEPEP_V2_EXPERTS=grouped",
        )


def _choose_layout(settings: settings_module.Settings, choice: Choice) -> tuple[str, str]:
    """The layout that layers are built for, and why."""
    carrier, asked = CARRIERS[MEGATRONS_OWN if choice.kind == "megatron" else choice.kind], settings.layout
    if settings.sync_free:
        if "sync-free" not in carrier.layouts or asked == "compact":
            raise SettingsError(
                "sync-free mode needs a buffer that does not wait, and its own layout behind it",
                found=f"sync_free from {settings.source('sync_free')}; the {choice.kind} buffer, layout={asked}",
                needed="the elastic or the reference buffer, and layout=auto or expanded",
                fix="unset MCORE_DEEPEP_V2_SYNC_FREE, or MCORE_DEEPEP_V2_LAYOUT; or install deep_ep >= 2.1",
            )
        return "sync-free", f"sync_free is on ({settings.source('sync_free')})"
    if "expanded" not in carrier.layouts:
        if asked == "expanded":
            raise SettingsError(
                f"deep_ep's {carrier.label} has no expanded layout",
                found=f"layout=expanded from {settings.source('layout')}; {choice.reason}",
                needed="layout=compact or auto, or deep_ep with ElasticBuffer",
                fix="unset MCORE_DEEPEP_V2_LAYOUT, or install deep_ep >= 2.1",
            )
        return "compact", f"the {carrier.label} has no other"
    if carrier.is_v2 and not settings.allow_multiple_reduction:
        # deep_ep 2.1.0: in the expanded layout, weights are carried back only with multiple reduction.
        if asked == "expanded":
            raise SettingsError(
                "the expanded layout cannot be combined with allow_multiple_reduction=false",
                found=f"layout from {settings.source('layout')}, "
                f"allow_multiple_reduction from {settings.source('allow_multiple_reduction')}",
                fix="set MCORE_DEEPEP_V2_LAYOUT=compact, or leave allow_multiple_reduction on",
            )
        return "compact", f"allow_multiple_reduction is off ({settings.source('allow_multiple_reduction')})"
    if asked != "auto":
        return asked, f"asked for by {settings.source('layout')}"
    return "expanded", "this buffer sorts rows by expert itself, so nothing is permuted"


def _has_layers() -> bool:
    """Whether a layer that was built here is alive."""
    managers = sys.modules.get("megatron_ep_v2.megatron.managers")  # not there where nothing was bound
    if managers is None or not managers.managers:
        return False
    gc.collect()  # a model that was given up lives on in cycles until then
    return bool(managers.managers)


def _bindings(modules: dict[str, ModuleType], layout: str, experts: str) -> list[tuple[Any, str, Any]]:
    """Everything to bind: module or class, name, our object."""
    ours: list[tuple[Any, str, Any]] = [
        (modules[FUSED_A2A], "HAVE_DEEP_EP", bool(probe().carriers)),
        (modules[FUSED_A2A], "FusedDispatch", fused_a2a.FusedDispatch),
        (modules[FUSED_A2A], "FusedCombine", fused_a2a.FusedCombine),
    ]
    for module in (modules[FUSED_A2A], modules[TOKEN_DISPATCHER]):
        for name in ("fused_dispatch", "fused_combine", "set_deepep_num_sms"):
            ours.append((module, name, getattr(fused_a2a, name)))
    # It imports Megatron, whose symbols are checked by now.
    from megatron_ep_v2.megatron import managers

    ours.append((modules[TOKEN_DISPATCHER], MANAGER, managers.BY_LAYOUT[layout]))
    ours.append((managers, "installed", managers.Installed(layout, experts)))
    flex = modules[TOKEN_DISPATCHER].MoEFlexTokenDispatcher
    ours.append((flex, "dispatch_preprocess", managers.preprocess(flex.dispatch_preprocess)))
    if layout != "compact":
        ours.append((modules[SCHEDULE], "should_free_input", managers.keep_rows(modules[SCHEDULE].should_free_input)))
    for function in checkpoints(modules):
        ours.append((function, "forward", recompute.wrapped(function.forward)))
    ours += optimizer_step.bindings(modules)
    for module in (dist, dist.distributed_c10d):
        ours.append((module, "destroy_process_group", _destroy_buffers_before(module.destroy_process_group)))
    return ours


def _bindings_of_experts(version: str, experts: str) -> list[tuple[Any, str, Any]]:
    """What builds the experts, and what keeps optimizer states of different kinds apart: that also while Megatron's are
    built, where it can, for a checkpoint of ours may be loaded into them."""
    try:
        modules = find_experts_seam(version)
    except SeamError as error:
        if experts != "megatron":
            raise
        logger.info("checkpoints of other experts than Megatron's will not be explained: %s", error)
        return []
    from megatron_ep_v2.megatron import expert_checkpoint
    from megatron_ep_v2.megatron import experts as experts_module

    optimizer, loader = modules[OPTIMIZER].DistributedOptimizer, modules[DIST_CHECKPOINTING]
    by_number, whole = "sharded_param_state_dp_reshardable", "sharded_param_state_dp_zero"
    ours: list[tuple[Any, str, Any]] = [
        (optimizer, by_number, expert_checkpoint.mark_buffers(getattr(optimizer, by_number))),
        (optimizer, whole, expert_checkpoint.refuse_whole_buffers(getattr(optimizer, whole))),
        (loader, "load", expert_checkpoint.explain_load(loader.load)),
        *experts_module.bindings(),
    ]
    if experts != "megatron":
        layer = modules[MOE_LAYER].MoELayer
        ours.append((layer, "__init__", experts_module.built_with(layer.__init__, _experts_now)))
    return ours


def _experts_now() -> str:
    """What a MoE layer is to be built with; asked for each one, for who has bound after us may keep our function."""
    _bind_refusals()
    return _installation.experts if _installation is not None else "megatron"


def _bind_refusals() -> None:
    """What has been imported since `install()`: frameworks above Megatron come later."""
    from megatron_ep_v2.megatron import experts

    if _installation is not None:
        for owner, name, ours in experts.bindings():
            _bind(_installation, owner, name, ours)


def _bind(installation: _Installation, owner: Any, name: str, ours: Any) -> None:
    theirs = inspect.getattr_static(owner, name)  # as it stands there: a class may hold a staticmethod
    bound = staticmethod(ours) if isinstance(theirs, staticmethod) else ours
    installation.bound.append((owner, name, theirs, bound))
    setattr(owner, name, bound)


def _destroy_buffers_before(destroy_process_group: Any) -> Any:
    """`destroy_process_group` that destroys the buffers of the group first: afterwards they could only hang or leak."""

    @functools.wraps(destroy_process_group)
    def destroy(group: Any = None) -> None:
        pool.destroy_buffers(group)
        destroy_process_group(group)

    return destroy
