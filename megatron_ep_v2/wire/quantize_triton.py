"""The Triton kernels of `quantize`, equal to its PyTorch reference bit by bit. One pass over memory each.

A program handles BLOCK packs of 128 columns, as a tile [BLOCK * groups per pack, columns per group].
"""

import torch
import triton
import triton.language as tl

from megatron_ep_v2.kernels.launch import ceil_div, launch
from megatron_ep_v2.wire.formats import WireFormat
from megatron_ep_v2.wire.quantize import MIN_EXPONENT, NAN_EXPONENT, PACK, ROUND_UP

BLOCK = 32

_PACK = tl.constexpr(PACK)
_MIN_EXPONENT = tl.constexpr(MIN_EXPONENT)
_NAN_EXPONENT = tl.constexpr(NAN_EXPONENT)
_ROUND_UP = tl.constexpr(ROUND_UP)


def quantize(x: torch.Tensor, kind: WireFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quantize.quantize`."""
    rows, hidden = x.shape
    packs = ceil_div(hidden, PACK)
    values = torch.empty_like(x, dtype=torch.uint8)
    scales = torch.empty(rows, packs, dtype=torch.int32, device=x.device)
    grid = (ceil_div(rows * packs, BLOCK), 1, 1)
    launch(_quantize, grid, (x, values, scales), (rows * packs,), (packs, hidden, kind.columns, BLOCK))
    return values.view(torch.float8_e4m3fn), scales.view(getattr(torch, kind.scale_dtype))


def dequantize(values: torch.Tensor, scales: torch.Tensor, kind: WireFormat, dtype: torch.dtype) -> torch.Tensor:
    """See `quantize.dequantize`."""
    rows, hidden = values.shape
    packs = ceil_div(hidden, PACK)
    out = torch.empty_like(values, dtype=dtype)
    bits, words = values.view(torch.uint8), scales.view(torch.int32)
    grid = (ceil_div(rows * packs, BLOCK), 1, 1)
    launch(_dequantize, grid, (bits, words, out), (rows * packs,), (packs, hidden, kind.columns, BLOCK))
    return out


@triton.jit
def _offsets(  # type: ignore[no-untyped-def]
    num_packs, PACKS: tl.constexpr, HIDDEN: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Offsets of this program's tile, and a mask of those inside the matrix."""
    groups: tl.constexpr = _PACK // GROUP
    index = tl.program_id(0) * (BLOCK * groups) + tl.arange(0, BLOCK * groups)
    pack = index // groups
    row, first = pack // PACKS, pack % PACKS * _PACK + index % groups * GROUP
    column = first[:, None] + tl.arange(0, GROUP)[None, :]
    here = (pack < num_packs)[:, None] & (column < HIDDEN)
    return row.to(tl.int64)[:, None] * HIDDEN + column, here


@triton.jit(do_not_specialize=["num_packs"])
def _quantize(  # type: ignore[no-untyped-def]
    x,
    values,
    scales,
    num_packs,
    PACKS: tl.constexpr,
    HIDDEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    groups: tl.constexpr = _PACK // GROUP
    offsets, here = _offsets(num_packs, PACKS, HIDDEN, GROUP, BLOCK)
    tile = tl.load(x + offsets, mask=here, other=0.0).to(tl.float32)
    amax = tl.max(tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    exponent = tl.maximum(((amax + _ROUND_UP) >> 23) - 8, _MIN_EXPONENT)
    finite = amax < 0x7F800000
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.where(finite[:, None], tile * inverse[:, None], 0.0)
    bits = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(values + offsets, bits, mask=here)

    exponent = tl.where(finite, exponent, _NAN_EXPONENT)
    if groups == 1:
        packed = tl.where(finite, exponent << 23, 0x7FC00000)
    else:
        shifts = tl.arange(0, groups) * 8
        packed = tl.sum(tl.reshape(exponent, [BLOCK, groups]) << shifts[None, :], axis=1)
    pack = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(scales + pack, packed, mask=pack < num_packs)


@triton.jit(do_not_specialize=["num_packs"])
def _dequantize(  # type: ignore[no-untyped-def]
    values,
    scales,
    out,
    num_packs,
    PACKS: tl.constexpr,
    HIDDEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    groups: tl.constexpr = _PACK // GROUP
    offsets, here = _offsets(num_packs, PACKS, HIDDEN, GROUP, BLOCK)
    tile = tl.load(values + offsets, mask=here, other=0).to(tl.float8e4nv, bitcast=True).to(tl.float32)

    index = tl.program_id(0) * (BLOCK * groups) + tl.arange(0, BLOCK * groups)
    packed = tl.load(scales + index // groups, mask=index // groups < num_packs, other=0)
    if groups > 1:
        exponent = (packed >> (index % groups * 8)) & 0xFF
        packed = tl.where(exponent == _NAN_EXPONENT, 0x7FC00000, exponent << 23)
    scale = packed.to(tl.float32, bitcast=True)
    tl.store(out + offsets, (tile * scale[:, None]).to(out.dtype.element_ty), mask=here)
