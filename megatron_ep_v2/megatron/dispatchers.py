"""Which token dispatchers MoE layers were built with: for `status()`, and for one warning at the first training step.

`install()` binds the flex dispatcher's backend "deepep", and a job that builds its layers with another one runs as if
nothing was installed. Frameworks choose for themselves: Megatron-Bridge 0.6.2 goes back to alltoall on GPUs whose name
it does not know, with a warning of its own among many.

A dense model, a pipeline stage without MoE layers and experts on one rank have nothing to dispatch. Another backend of
the flex dispatcher (hybridep, ncclep) has been asked for by name. None of them is warned about.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from megatron_ep_v2.megatron.symbols import TOKEN_DISPATCHER

logger = logging.getLogger("megatron_ep_v2")

_NONE = "none with anything to dispatch was built since it was installed"  # of more than one rank
_built: weakref.WeakSet[Any] = weakref.WeakSet()  # dispatchers whose constructor ran while it was bound
_stepped = True  # whether the first training step with MoE layers after install() has been


def noting(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap the constructor of `MoETokenDispatcher`, which all of Megatron's dispatchers call."""

    @functools.wraps(init)
    def note(self: Any, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        _built.add(self)

    return note


def expect_step() -> None:
    """The next training step is the first one after `install()`."""
    global _stepped
    _stepped = False


def forget() -> None:
    """Forget all dispatchers: after `uninstall()`, layers are built with others on purpose."""
    global _stepped
    _built.clear()
    _stepped = True


def describe() -> str:
    """How many MoE layers of this process dispatch through this package, and what the others were built with."""
    ours, others = _ours(), _others()
    if not ours:
        return f"no MoE layer dispatches through it: {_count(others)}" if others else _NONE
    return f"{ours} dispatch through it" + (f"; others do not: {_count(others)}" if others else "")


def check_first_step() -> None:
    """Warn at the first training step if MoE layers were built, and all of them with another dispatcher."""
    global _stepped
    if _stepped:
        return
    ours, others = _ours(), _others()
    _stepped = bool(ours or others)  # else a dense model's, and one with MoE layers may follow
    unintended = [dispatcher for dispatcher in others if not _other_backend(dispatcher.config)]
    if unintended and not ours and _is_first_of_stage(unintended[0]):
        logger.warning(
            "megatron_ep_v2 is installed, but no MoE layer dispatches through it: %s; needed before the model is "
            "built: moe_token_dispatcher_type=flex and moe_flex_dispatcher_backend=deepep",
            _count(others),
        )


def _ours() -> int:
    """Layers that are alive with a manager of this package."""
    managers = sys.modules.get("megatron_ep_v2.megatron.managers")  # imported when the first symbols are bound
    return len(managers.managers) if managers is not None else 0


def _others() -> list[Any]:
    """Dispatchers that are alive, have more than one rank, and no manager of this package."""
    if not _built:
        return []
    from megatron_ep_v2.megatron.managers import CompactManager

    return [
        dispatcher
        for dispatcher in _built
        if dispatcher.tp_size * dispatcher.ep_size > 1
        and not isinstance(getattr(dispatcher, "_comm_manager", None), CompactManager)
    ]


def _other_backend(config: Any) -> bool:
    return config.moe_token_dispatcher_type == "flex" and config.moe_flex_dispatcher_backend != "deepep"


def _count(dispatchers: list[Any]) -> str:
    counted = Counter(map(_describe, dispatchers))
    return ", ".join(f"{number} built with {what}" for what, number in sorted(counted.items()))


def _describe(dispatcher: Any) -> str:
    """The configuration that chose this dispatcher, and its class if that is not Megatron's."""
    config, kind = dispatcher.config, type(dispatcher)
    text = f"moe_token_dispatcher_type={config.moe_token_dispatcher_type}"
    if config.moe_token_dispatcher_type == "flex":
        text += f", moe_flex_dispatcher_backend={config.moe_flex_dispatcher_backend}"
        kind = type(getattr(dispatcher, "_comm_manager", dispatcher))
    return text if kind.__module__ == TOKEN_DISPATCHER else f"{text} ({kind.__module__}.{kind.__qualname__})"


def _is_first_of_stage(dispatcher: Any) -> bool:
    """Whether this is the one rank that speaks for its pipeline stage: rank 0 may have no MoE layer."""
    from megatron.core import parallel_state

    if dispatcher.tp_ep_group.rank() != 0:
        return False
    known = parallel_state.model_parallel_is_initialized()  # else the user has made the process groups
    return not known or parallel_state.get_expert_data_parallel_rank() == 0
