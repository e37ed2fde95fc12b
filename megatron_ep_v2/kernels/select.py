"""Which of a kernel's two modules runs: `name`, its definition in PyTorch; or `name_triton`, its equal on CUDA."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import torch

from megatron_ep_v2.errors import UnavailableError

logger = logging.getLogger("megatron_ep_v2")


def kernels_for(tensor: torch.Tensor, definition: ModuleType, what: str, otherwise: str = "") -> Any:
    """The module whose functions take this tensor.

    Args:
        tensor: Any of the functions' tensors.
        definition: The module in PyTorch.
        what: Needs Triton on GPUs, for the error: "layouts".
        otherwise: What else the reader can do: ", or set ...".

    Raises:
        UnavailableError: A CUDA tensor, and no Triton that has what the kernels use.
    """
    return _required(definition, what, otherwise) if tensor.is_cuda else definition


@functools.cache
def _required(definition: ModuleType, what: str, otherwise: str) -> ModuleType:
    try:
        return importlib.import_module(f"{definition.__name__}_triton")
    except ImportError as error:
        raise UnavailableError(
            f"{what} on GPUs need Triton",
            found=str(error),
            needed="3.3 or newer",
            fix=f"pip install 'triton>=3.3'{otherwise}",
        ) from error


@functools.cache
def triton_if_installed(name: str, what: str) -> Any:
    """The Triton module of a kernel whose definition is as good on GPUs, only slower; None where there is none, which
    is logged once.

    Args:
        name: Of the definition: "megatron_ep_v2.kernels.topk".
        what: PyTorch does then, for the log: "torch.topk finds each token's experts".
    """
    try:
        return importlib.import_module(f"{name}_triton")
    except ImportError as error:
        logger.warning("%s, more slowly than Triton 3.3 would: %s", what, error)
        return None
