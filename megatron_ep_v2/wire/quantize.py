"""Quantises rows for the wire: unchanged, or 8 bits per element with a scale for each group of columns.

    fp8     e4m3 values, one fp32 scale for 128 columns of a row
    mxfp8   e4m3 values, one UE8M0 scale (a byte: the exponent) for 32 columns of a row, four to an int32

Both send 4 bytes of scales for 128 columns: 0.516 of the bytes of bf16. In both, a scale is the smallest power of two
with which the group fits into e4m3, but at least 2**-117. So received values are exact in bf16; and TransformerEngine,
which uses the same scales by default, changes nothing when it quantises these rows again. It costs little: on normal
random numbers the error is 2.7 % in L2, instead of 2.6 % with scales of amax / 448.

Received values for x, in a group whose largest magnitude is amax:
    in general      within 2**-4 * abs(x) or 2**-17 * amax of x, whichever is more; zero stays zero
    tiny groups     with amax below 2**-109: within 2**-4 * abs(x) or 2**-127 of x
    huge values     infinity from 3.29e38 on (bf16 ends at 3.39e38), because they round up to 2**128
    NaN, infinity   the whole group arrives as NaN

PyTorch, for every device; `quantize_triton` is equal on CUDA tensors bit by bit. `formats` has the table.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
import torch.nn.functional as F

from megatron_ep_v2.buffers.contract import Payload
from megatron_ep_v2.kernels.select import kernels_for
from megatron_ep_v2.wire.formats import FORMATS, WireFormat

PACK = 128  # columns that share 4 bytes of scales

# A scale is 2**(exponent - 127), as in fp32 and in UE8M0. Zeros, and magnitudes below 448 * 2**-117, get the smallest
# scale, so that no sent or received number is subnormal in bf16.
MIN_EXPONENT = 10
NAN_EXPONENT = 255  # UE8M0's NaN
# The largest e4m3 is 448 = 1.75 * 2**8, so the scale's exponent rounds up where amax's mantissa is above 1.75.
ROUND_UP = 0x1FFFFF


def to_wire(x: torch.Tensor, dtype: str) -> Payload:
    """Convert x [T, H] contiguous to a payload: x itself, or values and scales.

    Args:
        x: Other than 2-D tensors are returned unchanged, for the buffer to refuse.
        dtype: "bf16" or a name of `FORMATS`.
    """
    if dtype not in FORMATS or x.dim() != 2:
        return x
    return _kernels(x).quantize(x, FORMATS[dtype])


def from_wire(payload: Payload, sent_as: str, dtype: torch.dtype) -> torch.Tensor:
    """Convert a received payload to rows [R, H] or [P, H], dequantised if they were sent in 8 bits.

    Args:
        payload: From the dispatch.
        sent_as: The `dtype` given to `to_wire`.
        dtype: dtype of the result.
    """
    if isinstance(payload, torch.Tensor):
        return payload
    return _kernels(payload[0]).dequantize(*payload, FORMATS[sent_as], dtype)


def _kernels(rows: torch.Tensor) -> ModuleType:
    """The module with `quantize` and `dequantize` for this device."""
    variables = "MCORE_DEEPEP_V2_DISPATCH_DTYPE and MCORE_DEEPEP_V2_GRAD_DISPATCH_DTYPE"
    return kernels_for(rows, sys.modules[__name__], "8-bit rows", f", or set {variables} to bf16")


def quantize(x: torch.Tensor, kind: WireFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows as the module's docstring describes.

    Args:
        x: [T, H] bf16, fp16 or fp32, contiguous. If H is not a multiple of 128, the last group is shorter.
        kind: One of `FORMATS`.

    Returns:
        Values [T, H] float8_e4m3fn, and scales [T, ceil(H / 128)]: fp32, or int32 with the exponent of the first of
        four groups in the lowest byte. Missing groups at the end of a row have the smallest exponent.
    """
    (rows, hidden), group = x.shape, kind.columns
    padded = F.pad(x.float(), (0, -hidden % PACK))
    grouped = padded.view(rows, padded.shape[1] // group, group)
    # The bits of magnitudes are in the order of the magnitudes, infinity above them and NaN above infinity.
    amax = (grouped.view(torch.int32) & 0x7FFFFFFF).amax(dim=2)
    exponent = (((amax + ROUND_UP) >> 23) - 8).clamp(min=MIN_EXPONENT)
    finite = amax < 0x7F800000
    inverse = ((254 - exponent) << 23).view(torch.float32)
    scaled = torch.where(finite[..., None], grouped * inverse[..., None], 0.0)
    values = scaled.to(torch.float8_e4m3fn).view(padded.shape)[:, :hidden].contiguous()
    exponent = torch.where(finite, exponent, NAN_EXPONENT)
    if group == PACK:
        return values, _power_of_two(exponent)
    return values, exponent.to(torch.uint8).view(torch.int32)  # little-endian, as CUDA is


def dequantize(values: torch.Tensor, scales: torch.Tensor, kind: WireFormat, dtype: torch.dtype) -> torch.Tensor:
    """Multiply values by scales. Padding, which has zeros and scales of zero, stays zero.

    Args:
        values: [R, H] float8_e4m3fn, contiguous.
        scales: [R, ceil(H / 128)] fp32 or int32, contiguous.
        kind: One of `FORMATS`.
        dtype: dtype of the result.
    """
    hidden = values.shape[1]
    if kind.columns < PACK:
        scales = _power_of_two(scales.view(torch.uint8).int())
    by_column = scales.repeat_interleave(kind.columns, dim=1)[:, :hidden]
    return (values.float() * by_column).to(dtype)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """int32 exponents -> fp32 scales; 255 becomes NaN, and 0, which only padding has, becomes 0."""
    bits = torch.where(exponent == NAN_EXPONENT, 0x7FC00000, exponent << 23)
    return bits.to(torch.int32).view(torch.float32)
