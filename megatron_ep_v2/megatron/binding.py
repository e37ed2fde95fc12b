"""Bind this package to an installed Megatron-Core, all symbols or none, and undo it.

Megatron's `token_dispatcher` imports the functions of `fused_a2a` by name, so they are bound in both modules. No file
of Megatron is edited, and `uninstall()` restores only symbols that are still bound to this package.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2 import fused_a2a, recompute
from megatron_ep_v2 import settings as settings_module
from megatron_ep_v2.buffers import capacity, pool
from megatron_ep_v2.buffers.carriers import CARRIERS, DEFAULT_V2, MEGATRONS_OWN, REFERENCE
from megatron_ep_v2.errors import SeamError, SettingsError
from megatron_ep_v2.experts.gemm import gemm
from megatron_ep_v2.generations import install_command
from megatron_ep_v2.megatron import dispatchers, optimizer_step
from megatron_ep_v2.megatron.symbols import (
    DDP,
    DIST_CHECKPOINTING,
    FORWARD_BACKWARD,
    FULL_GRAPH,
    FUSED_A2A,
    MANAGER,
    MOE_LAYER,
    OPTIMIZER,
    SCHEDULE,
    TOKEN_DISPATCHER,
    Binding,
    Bound,
    Owner,
    checkpoints,
    find_expert_symbols,
    find_repeat_symbols,
    find_symbols,
)
from megatron_ep_v2.probe import Choice, choose, probe

if TYPE_CHECKING:
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

logger = logging.getLogger("megatron_ep_v2")


@dataclass
class _Installation:
    """Result of `install()`.

    Attributes:
        by: "install()", or what has asked `megatron_ep_v2.auto` for it.
    """

    by: str
    choice: Choice
    layout: str
    layout_reason: str
    experts: str
    experts_reason: str
    megatron_version: str
    bound: list[Bound] = field(default_factory=list)


_installation: _Installation | None = None
_decided = False  # whether this process has called install() or uninstall(): from then on, auto leaves it as it is


def install(**explicit: bool | float | str | None) -> dict[str, object]:
    """Make Megatron-Core's flex token dispatcher (backend "deepep") run on this package. Call it before the model is
    built. A second call without arguments changes nothing; with arguments, it replaces the first (if it then fails,
    Megatron is as before both calls). Existing models continue: the settings that Megatron's configuration decided for
    them are kept unless the call sets them. But a layer that was built for another layout or other experts raises a
    SettingsError before it dispatches.

    If only the legacy deep_ep is installed, Megatron's own dispatcher stays unchanged, and the log says so. Experts
    other than Megatron's are bound with any carrier.

    Args:
        **explicit: Settings by name (see `settings.Settings`): buffer, layout, num_max_tokens_per_rank, num_sms, ...

    Returns:
        `status()`.

    Raises: (without a change to Megatron)
        SettingsError: A setting cannot be used.
        UnavailableError: No buffer can be used here.
        SeamError: Megatron-Core is missing, or a name or signature is not the expected one.
    """
    global _decided
    _decided = True
    if _installation is not None and not explicit:
        return status()
    return _install(explicit, "install()")


def install_automatically(by: str, executed: Collection[str] = ()) -> None:
    """`install()` for `megatron_ep_v2.auto`, which calls this whenever modules of Megatron have been imported. Does
    nothing once the process has called `install()` or `uninstall()`, also if that failed or is running.

    Args:
        by: What has asked for it.
        executed: Names of the modules that were imported. Bound symbols of theirs are gone (`importlib.reload`), so
            all are bound again.

    Raises:
        EPError: See `install`.
    """
    if _decided:
        return
    owners = [owner for owner, *_ in _installation.bound] if _installation is not None else []
    reloaded = {owner.__name__ if isinstance(owner, ModuleType) else owner.__module__ for owner in owners}
    if _installation is None or not reloaded.isdisjoint(executed):
        _install({}, by)


def _install(explicit: dict[str, bool | float | str | None], by: str) -> dict[str, object]:
    global _installation
    settings = settings_module.resolve(None, **explicit)
    if _installation is not None and _has_layers():
        settings = settings_module.keep_offers(settings, settings_module.active())
    choice = choose(probe(), settings)
    layout, layout_reason = _choose_layout(settings, choice)
    _check_experts(settings)
    _check_redundant_experts(settings, choice, layout, layout_reason)
    _restore()  # first, so that Megatron's own symbols are checked
    version, modules = find_symbols()

    experts_reason = f"asked for by {settings.source('experts')}" if settings.experts != "megatron" else "default"
    installation = _Installation(by, choice, layout, layout_reason, settings.experts, experts_reason, version)
    bindings: list[Binding] = []
    if choice.kind != "megatron":
        bindings += _bindings(modules, layout, settings.experts, settings.redundant_experts)
    if choice.kind != "megatron" and layout == "sync-free":
        bindings += _bindings_of_repeats(version)
    if choice.kind != "megatron" or settings.experts != "megatron":
        bindings += _bindings_of_experts(version, settings.experts)
    settings_module.activate(settings)
    for owner, name, ours in bindings:
        _bind(installation, owner, name, ours)
    if choice.kind != "megatron":
        pool.set_expected_tokens(capacity.expected)
        dispatchers.expect_step()
    _installation = installation
    found = probe()
    logger.info("HAVE_DEEP_EP=%s HAVE_DEEP_EP_V2=%s; %s", found.have_deep_ep, found.have_deep_ep_v2, found.describe())
    # Falling back from DeepEP V2 without being asked to is a warning, so that it shows at the default log level.
    second_best = choice.kind in ("megatron", REFERENCE) and settings.buffer == "auto"
    level = logging.WARNING if second_best and settings_module.is_first_rank() else logging.INFO
    logger.log(level, "megatron-core %s: %s", version, _sentence(installation))
    return status()


def uninstall() -> None:
    """Destroy the buffers and restore Megatron's symbols, except those that other code has rebound since. Existing
    layers raise a ClosedError before they dispatch, until the same layout and experts are installed again."""
    global _decided
    _decided = True
    _restore()
    dispatchers.forget()


def _restore() -> None:
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


def moe_submodules(submodules: MoESubmodules) -> MoESubmodules:
    """Call `install()` and return Megatron's MoESubmodules with the installed experts. For a patched Megatron, whose
    first MoE layer is already being built when `install()` binds its constructor.

    Raises:
        EPError: See `install` and `megatron.experts.with_experts`.
    """
    install()
    assert _installation is not None
    if _installation.experts == "megatron":
        return submodules
    from megatron_ep_v2.megatron.experts import with_experts

    return with_experts(submodules, _installation.experts)


def bound() -> list[Bound]:
    """Bound symbols, for code that switches between installations."""
    return list(_installation.bound) if _installation else []


def status() -> dict[str, object]:
    """Report what is installed and active, as JSON-able values."""
    found = probe()
    report: dict[str, object] = {
        "installed": _installation is not None,
        "have_deep_ep": found.have_deep_ep,
        "have_deep_ep_v2": found.have_deep_ep_v2,
        "deep_ep": found.describe(),
        "settings": settings_module.active().describe(),
        "buffers": [pool.describe(buffer, settings_module.active()) for buffer in pool.buffers()],
    }
    if _installation is not None:
        report |= {
            "installed_by": _installation.by,
            "megatron_core": _installation.megatron_version,
            "buffer": _installation.choice.kind,
            "buffer_reason": _installation.choice.reason,
            "layout": _installation.layout,
            "layout_reason": _installation.layout_reason,
            "experts": _installation.experts,
            "experts_reason": _installation.experts_reason,
        }
        if _installation.choice.kind != "megatron":
            report["moe_layers"] = dispatchers.describe()
    return report


def _sentence(installation: _Installation) -> str:
    experts = f"{installation.experts} experts ({installation.experts_reason}); by {installation.by}"
    if installation.choice.kind == "megatron":
        what = "nothing" if installation.experts == "megatron" else "nothing in the dispatcher"
        return f"{what} was changed ({installation.choice.reason}); {experts}"
    return (
        "flex dispatcher (backend deepep) bound to "
        f"the {installation.choice.kind} buffer ({installation.choice.reason}), "
        f"{installation.layout} layout ({installation.layout_reason}), {experts}"
    )


def _check_experts(settings: settings_module.Settings) -> None:
    """Check that the experts of the settings can run.

    Raises:
        UnavailableError: They cannot run here.
        SettingsError: They wait on the host, which sync-free mode must not.
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


def _check_redundant_experts(
    settings: settings_module.Settings, choice: Choice, layout: str, layout_reason: str
) -> None:
    """Check that redundant experts go with the other settings.

    Raises:
        SettingsError: They do not, or a number of the plan is out of range.
    """
    if settings.balance_min_rows < 1 or settings.balance_from_percent < 100:
        raise SettingsError(
            "a number of the plan of redundant experts is out of range",
            found=f"balance_min_rows={settings.balance_min_rows}, balance_from_percent={settings.balance_from_percent}",
            needed="balance_min_rows 1 or more, balance_from_percent 100 or more",
            fix="unset MCORE_DEEPEP_V2_BALANCE_MIN_ROWS and MCORE_DEEPEP_V2_BALANCE_FROM_PERCENT",
        )
    if not settings.redundant_experts:
        return
    asked = f"redundant_experts={settings.redundant_experts} from {settings.source('redundant_experts')}"
    off = "unset MCORE_DEEPEP_V2_REDUNDANT_EXPERTS"
    kind = MEGATRONS_OWN if choice.kind == "megatron" else choice.kind
    if not CARRIERS[kind].moves_experts:
        raise SettingsError(
            f"deep_ep's {CARRIERS[kind].label} does not move redundant experts",
            found=f"{asked}; {choice.reason}",
            needed=" or ".join(f"the {carrier.label}" for carrier in CARRIERS.values() if carrier.moves_experts),
            fix=f"install DeepEP 2.5: {install_command('2.5', torch.__version__)}; or {off}",
        )
    if layout != "expanded":
        raise SettingsError(
            f"redundant experts do not run in the {layout} layout",
            found=f"{asked}; {layout_reason}",
            needed="the expanded layout",
            fix=f"leave MCORE_DEEPEP_V2_LAYOUT and MCORE_DEEPEP_V2_SYNC_FREE unset, or {off}",
        )
    if settings.experts not in ("grouped", "sequential"):
        raise SettingsError(
            f"redundant experts need experts that read replica slots, which experts={settings.experts} do not",
            found=f"{asked}; experts from {settings.source('experts')}",
            needed="experts=grouped, or sequential",
            fix=f"set MCORE_DEEPEP_V2_EXPERTS=grouped, or {off}",
        )


def _choose_layout(settings: settings_module.Settings, choice: Choice) -> tuple[str, str]:
    """`(layout that layers are built for, reason)`."""
    carrier, asked = CARRIERS[MEGATRONS_OWN if choice.kind == "megatron" else choice.kind], settings.layout
    if settings.sync_free:
        if "sync-free" not in carrier.layouts or asked == "compact":
            raise SettingsError(
                "sync-free mode needs a buffer that does not wait, and its own layout",
                found=f"sync_free from {settings.source('sync_free')}; the {choice.kind} buffer, layout={asked}",
                needed=f"{_carriers_with('sync-free')}, and layout=auto or expanded",
                fix=f"unset MCORE_DEEPEP_V2_SYNC_FREE, or MCORE_DEEPEP_V2_LAYOUT; or {_get_v2()}",
            )
        return "sync-free", f"sync_free is on ({settings.source('sync_free')})"
    if "expanded" not in carrier.layouts:
        if asked == "expanded":
            raise SettingsError(
                f"deep_ep's {carrier.label} has no expanded layout",
                found=f"layout=expanded from {settings.source('layout')}; {choice.reason}",
                needed=f"layout=compact or auto, or {_carriers_with('expanded')}",
                fix=f"unset MCORE_DEEPEP_V2_LAYOUT, or {_get_v2()}",
            )
        return "compact", f"the {carrier.label} has no other layout"
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


def _carriers_with(layout: str) -> str:
    return " or ".join(f"the {carrier.label}" for carrier in CARRIERS.values() if layout in carrier.layouts)


def _get_v2() -> str:
    """Fix of an error about the buffer: take what is installed of DeepEP V2, or install it."""
    if probe().v2_carrier is not None:
        return "leave the setting buffer at auto"
    generation = str(CARRIERS[DEFAULT_V2].generation)
    return f"install DeepEP {generation}: {install_command(generation, torch.__version__)}"


def _has_layers() -> bool:
    """Whether a layer with a manager of this package is alive."""
    managers = sys.modules.get("megatron_ep_v2.megatron.managers")  # imported when the first symbols are bound
    if managers is None or not managers.managers:
        return False
    gc.collect()  # a discarded model stays alive in reference cycles
    return bool(managers.managers)


def _bindings(modules: dict[str, ModuleType], layout: str, experts: str, redundant_experts: int) -> list[Binding]:
    """Symbols to bind."""
    ours: list[Binding] = [
        (modules[FUSED_A2A], "HAVE_DEEP_EP", bool(probe().carriers)),
        (modules[FUSED_A2A], "FusedDispatch", fused_a2a.FusedDispatch),
        (modules[FUSED_A2A], "FusedCombine", fused_a2a.FusedCombine),
    ]
    for module in (modules[FUSED_A2A], modules[TOKEN_DISPATCHER]):
        for name in ("fused_dispatch", "fused_combine", "set_deepep_num_sms"):
            ours.append((module, name, getattr(fused_a2a, name)))
    # Imported here because it imports Megatron, whose symbols have been checked now.
    from megatron_ep_v2.megatron import dispatcher_functions, managers

    manager = managers.BY_LAYOUT[layout]
    if redundant_experts:
        from megatron_ep_v2.megatron.redundant import RedundantManager

        manager = RedundantManager
    ours.append((modules[TOKEN_DISPATCHER], MANAGER, manager))
    ours.append((managers, "installed", managers.Installed(layout, experts, redundant_experts)))
    flex = modules[TOKEN_DISPATCHER].MoEFlexTokenDispatcher
    ours.append((flex, "dispatch_preprocess", dispatcher_functions.preprocess(flex.dispatch_preprocess)))
    ours.append((flex, "combine_postprocess", dispatcher_functions.postprocess(flex.combine_postprocess)))
    any_dispatcher = modules[TOKEN_DISPATCHER].MoETokenDispatcher
    ours.append((any_dispatcher, "__init__", dispatchers.noting(any_dispatcher.__init__)))
    if layout != "compact":
        ours.append(
            (
                modules[SCHEDULE],
                "should_free_input",
                dispatcher_functions.keep_rows(modules[SCHEDULE].should_free_input),
            )
        )
    for function in checkpoints(modules):
        ours.append((function, "forward", recompute.wrapped(function.forward)))
    ours += optimizer_step.bindings(modules)
    for module in (dist, dist.distributed_c10d):
        ours.append((module, "destroy_process_group", _destroy_buffers_before(module.destroy_process_group)))
    return ours


def _bindings_of_experts(version: str, experts: str) -> list[Binding]:
    """Bindings that build the experts, zero their delayed gradients, and keep optimizer states of different kinds
    apart. With Megatron's own experts all but the first are bound if the symbols exist: a layer spec may name ours, and
    a checkpoint of ours may be loaded into theirs."""
    try:
        modules = find_expert_symbols(version)
    except SeamError as error:
        if experts != "megatron":
            raise
        logger.info("failed loads of checkpoints with other experts than Megatron's will not be explained: %s", error)
        return []
    from megatron_ep_v2.megatron import expert_checkpoint, stacked_linear
    from megatron_ep_v2.megatron import experts as experts_module

    optimizer, loader = modules[OPTIMIZER].DistributedOptimizer, modules[DIST_CHECKPOINTING]
    ddp = modules[DDP].DistributedDataParallel
    by_number, whole = "sharded_param_state_dp_reshardable", "sharded_param_state_dp_zero"
    ours: list[Binding] = [
        (optimizer, by_number, expert_checkpoint.mark_buffers(getattr(optimizer, by_number))),
        (optimizer, whole, expert_checkpoint.refuse_whole_buffers(getattr(optimizer, whole))),
        (loader, "load", expert_checkpoint.explain_load(loader.load)),
        (ddp, "zero_grad_buffer", stacked_linear.dropping_delayed(ddp.zero_grad_buffer)),
        *experts_module.bindings(),
    ]
    if experts != "megatron":
        layer = modules[MOE_LAYER].MoELayer
        ours.append((layer, "__init__", experts_module.built_with(layer.__init__, _experts_now)))
    return ours


def _bindings_of_repeats(version: str) -> list[Binding]:
    """Bindings that repeat a step with more room, where Megatron's own loop would end."""
    modules = find_repeat_symbols(version)
    # Imported here because they import Megatron, whose symbols have been checked now.
    from megatron_ep_v2.megatron import forward_backward, full_cuda_graph

    return [*forward_backward.bindings(modules[FORWARD_BACKWARD]), *full_cuda_graph.bindings(modules[FULL_GRAPH])]


def _experts_now() -> str:
    """Experts for the MoE layer being built. Read per layer, because code that rebinds the constructor may keep
    ours."""
    _bind_refusals()
    return _installation.experts if _installation is not None else "megatron"


def _bind_refusals() -> None:
    """Bind guards in modules imported since `install()`: frameworks above Megatron are imported later."""
    from megatron_ep_v2.megatron import experts

    if _installation is not None:
        for owner, name, ours in experts.bindings():
            _bind(_installation, owner, name, ours)


def _bind(installation: _Installation, owner: Owner, name: str, ours: object) -> None:
    theirs = inspect.getattr_static(owner, name)  # keeps a staticmethod wrapped
    bound = staticmethod(ours) if isinstance(theirs, staticmethod) and callable(ours) else ours
    installation.bound.append((owner, name, theirs, bound))
    setattr(owner, name, bound)


def _destroy_buffers_before(
    destroy_process_group: Callable[[ProcessGroup | None], None],
) -> Callable[[ProcessGroup | None], None]:
    """Wrap `destroy_process_group` to destroy the group's buffers and captured graphs first: afterwards they could only
    hang or leak."""

    @functools.wraps(destroy_process_group)
    def destroy(group: ProcessGroup | None = None) -> None:
        pool.destroy_buffers(group)
        destroy_process_group(group)

    return destroy
