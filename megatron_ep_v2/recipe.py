"""What Megatron's configuration decides. What rows travel as where `dispatch_dtype=auto` follows the model: its FP8
recipe decides, once for the process. And another `install()` keeps what was decided.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.errors import SettingsError


def dtype_of_recipe(config: Any) -> tuple[settings.DispatchDtype, str]:
    """What dispatch_dtype=auto stands for, and why.

    8 bits travel only where the experts' GEMMs would round the same rows in the same groups anyway.

    Args:
        config: Megatron's TransformerConfig; only `fp8`, `fp8_recipe` and `fp4` are read.
    """
    if getattr(config, "fp4", None):
        return "bf16", "the model trains in FP4, which the transport does not carry"
    if not config.fp8:
        return "bf16", "the model trains without FP8"
    recipe = str(getattr(config.fp8_recipe, "value", config.fp8_recipe))  # an enum or its name
    if recipe == "blockwise":
        return "fp8", "the model's fp8_recipe is blockwise, with the same groups"
    if recipe == "mxfp8":
        if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0):
            return "mxfp8", "the model's fp8_recipe is mxfp8, with the same groups"
        return "bf16", "the model's fp8_recipe is mxfp8, but this is no GPU of compute capability 10.0 or more"
    return "bf16", f"the model's fp8_recipe is {recipe}, which does not scale groups of a row's columns"


def settle_dispatch_dtypes(dtype: settings.DispatchDtype, reason: str) -> None:
    """Give both dispatch dtypes that are still "auto" a value, once: a settled one does not change any more.

    Args:
        dtype: What the recipe of a model says, for both directions.
        reason: Why; becomes the source, as "auto: reason".

    Raises:
        SettingsError: "auto" was settled before, as something else.
    """
    for name in ("dispatch_dtype", "grad_dispatch_dtype"):
        current = settings.active()
        if getattr(current, name) == "auto":
            value: dict[str, Any] = {name: dtype}
            settings.activate(replace(current, **value, sources={**current.sources, name: f"auto: {reason}"}))
        elif current.source(name).startswith("auto: ") and getattr(current, name) != dtype:
            raise SettingsError(
                f"{name}=auto cannot follow two models of one process that differ",
                found=f"{current.describe()[name]}, and now {dtype} (auto: {reason})",
                needed="one value for the whole process",
                fix=f"set {settings.variable(name)} to one of " + ", ".join(settings.DISPATCH_DTYPES[1:]),
            )


def keep_offers(new: settings.Settings, before: settings.Settings) -> settings.Settings:
    """`new`, with what the models of `before` have decided where nobody gives it a value now."""
    kept: dict[str, Any] = {}
    for name in settings.NAMES:
        by_model = before.source(name).startswith(("Megatron's ", "auto: the model"))
        if by_model and (new.source(name) == "default" or getattr(new, name) == "auto"):
            kept[name] = getattr(before, name)
    return replace(new, **kept, sources={**new.sources, **{name: before.source(name) for name in kept}})
