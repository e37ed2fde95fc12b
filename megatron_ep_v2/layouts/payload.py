"""Gathers 8-bit rows together with their scales, in the scale layout that a GEMM needs.

DeepGEMM needs the scales of the rows "mn-major": [M, S] with strides (1, M rounded up to 16 bytes), so that TMA can
load a column. SM90 takes fp32 for 128 columns; SM100 takes int32 packs of four UE8M0 scales. It converts other layouts
in an extra kernel, which gathering into the right one saves.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch

from megatron_ep_v2.errors import InputError
from megatron_ep_v2.kernels import move
from megatron_ep_v2.kernels.select import kernels_for
from megatron_ep_v2.layouts.places import Places

# row_major: as on the wire. mn_major: transposed. ue8m0: transposed, with fp32 powers of two converted to packs.
ScaleLayout: TypeAlias = Literal["row_major", "mn_major", "ue8m0"]

_TMA_BYTES = 16  # DeepGEMM's get_tma_aligned_size


def gather_payload(
    payload: tuple[torch.Tensor, torch.Tensor], places: Places, layout: ScaleLayout = "row_major"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy rows and scales to their slots. No gradient: quantised rows have none.

    Args:
        payload: Values [R, H] of 1 byte per element; scales [R, S], fp32 or int32 packs of UE8M0.
        places: Slots of the selections.
        layout: Layout of the scales. `ue8m0` packs the exponents of fp32 scales, which must be powers of two (as those
            of `wire.quantize` are), four neighbours to an int32, the first in its lowest byte.

    Returns:
        Values [M, H], and scales: [M, S], or [M, ceil(S / 4)] int32 for `ue8m0`; with `expected_m`, 3-D as
        `Places.by_expert` gives it: [L, expected_m, H] and [L, expected_m, S]. Both are zero on padding.

    Raises:
        InputError: The scales cannot be converted to this layout, or the numbers of rows differ.
    """
    values, scales = payload
    if layout not in get_args(ScaleLayout) or scales.dtype not in (torch.float32, torch.int32):
        raise InputError(
            "scales cannot be delivered in this layout",
            found=f"{scales.dtype} scales, layout={layout!r}",
            needed=f"fp32 or int32 scales, and one of {', '.join(get_args(ScaleLayout))}",
            fix="pass the payload (values, scales) of an 8-bit dispatch, and one of these layouts by name",
        )
    if layout == "ue8m0" and scales.dtype != torch.float32:
        raise InputError(
            "these scales are packs of UE8M0 already",
            found="int32 scales",
            needed="fp32 scales for layout='ue8m0'",
            fix="layout='mn_major'",
        )
    if values.dim() != 2 or scales.dim() != 2 or not len(values) == len(scales) == len(places.slots):
        raise InputError(
            "the rows and scales do not fit their slots",
            found=f"{tuple(values.shape)} and {tuple(scales.shape)}",
            needed=f"({len(places.slots)}, hidden) and ({len(places.slots)}, scales)",
            fix="pass the payload and the places of one dispatch",
        )
    mover = kernels_for(values, move, "layouts")
    rows = mover.gather(values.contiguous(), places.rows)
    group = places.expected_m or places.num_rows
    if layout == "row_major":
        return places.by_expert(rows), places.by_expert(mover.gather(scales.contiguous(), places.rows))
    stride = tma_aligned(group)
    by_column = mover.gather_columns(scales.contiguous(), places.rows, group, stride, layout == "ue8m0")
    moved = by_column[:, :, :group].transpose(1, 2)
    return places.by_expert(rows), moved if places.expected_m else moved[0]


def tma_aligned(num_rows: int, element_size: int = 4) -> int:
    """Stride of a column of `num_rows` elements: rounded up to 16 bytes."""
    step = _TMA_BYTES // element_size
    return -(-num_rows // step) * step
