"""Functions of Megatron and its neighbours that would take stacked experts for something else, and say nothing.

Each is bound to a guard that raises where it meets a stacked parameter, and changes nothing otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ep_v2.errors import SettingsError

_KEEP = "experts=megatron (unset MCORE_DEEPEP_V2_EXPERTS)"


@dataclass(frozen=True)
class Refusal:
    """A function by its module and dotted name, and what the error says.

    Attributes:
        modules: Where the function is held; a version of Megatron may have only some of them, or none.
        found: What called it.
        needed: What would do instead.
        fix: How to get there.
    """

    modules: tuple[str, ...]
    name: str
    found: str
    needed: str
    fix: str


_MUON = {
    "found": "a Muon-type optimizer (--optimizer muon), which gives everything that is not 2-D to Adam",
    "needed": "Adam or SGD; or Megatron's own experts, a matrix each",
    "fix": f"--optimizer adam, or {_KEEP}",
}
REFUSALS = (
    Refusal(("megatron.core.optimizer.muon",), "_get_param_groups", **_MUON),  # 0.16, 0.17
    Refusal(("megatron.core.optimizer",), "_get_megatron_emerging_optimizer", **_MUON),  # 0.18 on
    Refusal(
        ("megatron.core.resharding.utils", "megatron.core.resharding.planner"),
        "extract_param_metadata",
        found="a refit (megatron.core.resharding), which takes the experts of all ranks for copies of one parameter",
        needed="one parameter for each expert",
        fix=f"refit with {_KEEP}; checkpoints fit either",
    ),
    Refusal(
        ("megatron.bridge.models.conversion.model_bridge",),
        "MegatronModelBridge.build_conversion_tasks",
        found="a conversion from or to Hugging Face by Megatron-Bridge, which skips parameters that it has no name for",
        needed="one parameter for each expert",
        fix=f"convert with {_KEEP}, and train with either kind from the distributed checkpoint between them",
    ),
)


def bindings() -> Iterator[tuple[Any, str, Any]]:
    """Owner, name and guarded function of everything that is here: Megatron's own, and what else is imported by now."""
    for refusal in REFUSALS:
        for module in refusal.modules:
            if module.startswith("megatron.core."):
                with contextlib.suppress(ImportError):
                    importlib.import_module(module)
            *path, name = refusal.name.split(".")
            owner = functools.reduce(lambda at, part: getattr(at, part, None), path, sys.modules.get(module))
            theirs = getattr(owner, name, None)
            if theirs is not None and not hasattr(theirs, "refuses_stacked_experts"):
                yield owner, name, _guarded(theirs, refusal)


def _guarded(theirs: Callable[..., Any], refusal: Refusal) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if any(_holds_stacked(value) for value in (*args, *kwargs.values())):
            raise SettingsError(
                "stacked experts, one parameter for all experts of a rank, are not understood there",
                found=refusal.found,
                needed=refusal.needed,
                fix=refusal.fix,
            )
        return theirs(*args, **kwargs)

    guarded.refuses_stacked_experts = True  # type: ignore[attr-defined]
    return guarded


def _holds_stacked(value: Any) -> bool:
    if isinstance(value, torch.nn.Module):
        return any(_holds_stacked(parameter) for parameter in value.parameters())
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(_holds_stacked(item) for item in value)
    return isinstance(value, torch.Tensor) and getattr(value, "stacked_experts", False)
