"""Which module's kernels are for a device."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.kernels import move, places


def kernels_of(tensor: torch.Tensor) -> tuple[Any, Any]:
    """The modules with `place`, `place_masked` and with `gather`, `take`, `reduce`, `spread` for this device."""
    if not tensor.is_cuda:
        return places, move
    try:
        from megatron_ep_v2.kernels import move_triton, places_triton
    except ImportError as error:
        raise UnavailableError(
            "layouts on GPUs need Triton", found=str(error), needed="3.3 or newer", fix="pip install 'triton>=3.3'"
        ) from error
    return places_triton, move_triton
