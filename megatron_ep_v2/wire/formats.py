"""The table of wire formats besides bf16. A new format is one row of `FORMATS` and its kernels; the settings, the
choice by a model's fp8_recipe and the kernels' callers iterate this table. No format is guessed from a dtype.

Imports nothing, because settings and the command line must work where torch cannot be imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class WireFormat:
    """An 8-bit wire format with a scale for each group of columns.

    Attributes:
        name: Value of the settings `dispatch_dtype` and `grad_dispatch_dtype`.
        columns: Columns of a row that share a scale.
        scale_dtype: Name of a torch dtype. deep_ep carries scales of 4 bytes per element: one fp32, or a
            pack of four UE8M0 exponents as an int32.
        recipe: Value of Megatron's `fp8_recipe` whose GEMMs round the same rows in the same groups anyway.
        capability: Minimum compute capability for that recipe; None = any.
    """

    name: str
    columns: int
    scale_dtype: str
    recipe: str
    capability: tuple[int, int] | None = None


FORMATS: dict[str, WireFormat] = {
    each.name: each
    for each in (
        WireFormat(name="fp8", columns=128, scale_dtype="float32", recipe="blockwise"),
        WireFormat(name="mxfp8", columns=32, scale_dtype="int32", recipe="mxfp8", capability=(10, 0)),
    )
}
# auto: follows the model's fp8_recipe. bf16: rows are sent unchanged.
DISPATCH_DTYPES = ("auto", "bf16", *FORMATS)
NOT_CARRIED = "nvfp4 is not carried: deep_ep takes 8-bit values with 4-byte packs of scales, and NVFP4 has neither"


class QuantizedConfig(Protocol):
    """What is read of Megatron's TransformerConfig; also `fp4`, which some versions lack."""

    fp8: str | None
    fp8_recipe: object  # an enum or its name


def dtype_of_recipe(config: QuantizedConfig) -> tuple[str, str]:
    """Resolve dispatch_dtype=auto: 8 bits only if the experts' GEMMs round the same rows in the same groups anyway.

    Returns:
        `(one of DISPATCH_DTYPES without auto, reason)`.
    """
    if getattr(config, "fp4", None):
        return "bf16", "the model trains in FP4, which the transport does not carry"
    if not config.fp8:
        return "bf16", "the model trains without FP8"
    recipe = str(getattr(config.fp8_recipe, "value", config.fp8_recipe))  # an enum or its name
    for each in FORMATS.values():
        if each.recipe != recipe:
            continue
        if each.capability and not _gpu_has(each.capability):
            needed = "{}.{}".format(*each.capability)
            return (
                "bf16",
                f"the model's fp8_recipe is {recipe}, but this is no GPU of compute capability {needed} or more",
            )
        return each.name, f"the model's fp8_recipe is {recipe}, with the same groups"
    return "bf16", f"the model's fp8_recipe is {recipe}, which does not scale groups of a row's columns"


def _gpu_has(capability: tuple[int, int]) -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= capability
