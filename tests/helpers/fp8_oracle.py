"""What 8-bit rows must be, computed the plain way in fp64: the 256 codes by their definition, the nearest of them."""

from __future__ import annotations

import functools
import math

import torch

PACK = 128  # columns that share 4 bytes of scales
GROUPS = {"fp8": 128, "mxfp8": 32}


@functools.cache
def codes() -> torch.Tensor:
    """The value of each e4m3 code [256] fp64: sign, 4 bits of exponent with bias 7, 3 of mantissa, one NaN."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        size = math.ldexp(mantissa / 8, -6) if exponent == 0 else math.ldexp(1 + mantissa / 8, exponent - 7)
        values.append(math.nan if code & 127 == 127 else -size if code & 128 else size)
    return torch.tensor(values, dtype=torch.float64)


def scale_of(amax: float) -> float:
    """The smallest power of two with which amax fits, 2**-117 at least."""
    exponent = -117
    while math.ldexp(448.0, exponent) < amax:
        exponent += 1
    return math.ldexp(1.0, exponent)


def scales(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """[T, groups] fp64, NaN for a group that is not finite; groups count up to a whole number of packs."""
    group = GROUPS[dtype]
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % PACK))
    by_row = []
    for row in padded:
        amaxes = [float(part.abs().max()) for part in row.split(group)]
        by_row.append([scale_of(amax) if math.isfinite(amax) else math.nan for amax in amaxes])
    return torch.tensor(by_row, dtype=torch.float64).view(len(x), padded.shape[1] // group)


def nearest(values: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 number of each, of two the one with an even mantissa, in fp64."""
    positive = codes()[:127]
    above = torch.searchsorted(positive, values.abs().contiguous()).clamp(max=126)
    below = (above - 1).clamp(min=0)
    high, low = positive[above] - values.abs(), values.abs() - positive[below]
    take_low = (low < high) | ((low == high) & (below % 2 == 0))
    return torch.where(take_low, positive[below], positive[above]).copysign(values)


def arrived(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """What arrives for x [T, H], in fp64; x itself where dtype is neither fp8 nor mxfp8."""
    if dtype not in GROUPS or not x.numel():
        return x.double()
    by_column = scales(x, dtype).repeat_interleave(GROUPS[dtype], dim=1)[:, : x.shape[1]]
    return nearest(x.double() / by_column) * by_column


def error_bound(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """For each element of finite x: half a step of e4m3, whose numbers have 4 bits down to 2**-6 and steps of 2**-9
    below; and scales are at most amax / 224, or 2**-117."""
    group = GROUPS[dtype]
    padded = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % PACK))
    amax = padded.view(len(x), -1, group).amax(dim=2).repeat_interleave(group, dim=1)[:, : x.shape[1]]
    return torch.maximum(2.0**-4 * x.double().abs(), 2.0**-10 * torch.clamp(amax / 224, min=2.0**-117))
