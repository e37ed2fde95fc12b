"""Rows to what a dispatch sends, and back: see `quantize` for the formats and their errors."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ep_v2.buffers.contract import Payload
from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.kernels import quantize

GROUP = {"fp8": 128, "mxfp8": 32}  # columns of a row that share a scale


def to_wire(x: torch.Tensor, dtype: str) -> Payload:
    """What a dispatch sends for x [T, H] contiguous: x itself, or values and scales.

    Args:
        x: Anything but a matrix is handed on, for the buffer to refuse.
        dtype: A settled `settings.DispatchDtype`.
    """
    if dtype not in GROUP or x.dim() != 2:
        return x
    return _kernels(x).quantize(x, GROUP[dtype])  # type: ignore[no-any-return]


def from_wire(payload: Payload, dtype: torch.dtype) -> torch.Tensor:
    """The rows [R, H] or [P, H] of a dispatch, dequantised to this dtype if they came quantised."""
    if isinstance(payload, torch.Tensor):
        return payload
    return _kernels(payload[0]).dequantize(*payload, dtype)  # type: ignore[no-any-return]


def _kernels(rows: torch.Tensor) -> Any:
    """The module whose `quantize` and `dequantize` are for this device."""
    if not rows.is_cuda:
        return quantize
    try:
        from megatron_ep_v2.kernels import quantize_triton
    except ImportError as error:
        raise UnavailableError(
            "8-bit rows on the wire need Triton on GPUs",
            found=str(error),
            needed="3.3 or newer",
            fix="pip install 'triton>=3.3', or set MCORE_DEEPEP_V2_DISPATCH_DTYPE and "
            "MCORE_DEEPEP_V2_GRAD_DISPATCH_DTYPE to bf16",
        ) from error
    return quantize_triton
