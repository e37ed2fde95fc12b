"""Chooses between a kernel's two modules: `name`, its definition in PyTorch; `name_triton`, the same on CUDA."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch

from megatron_ep_v2.errors import UnavailableError

logger = logging.getLogger("megatron_ep_v2")


def kernels_for(tensor: torch.Tensor, definition: ModuleType, what: str, otherwise: str = "") -> ModuleType:
    """The module whose functions work on this tensor's device.

    Args:
        tensor: Any argument of the functions.
        definition: The module in PyTorch.
        what: Subject of the error, "layouts" for example.
        otherwise: Alternative fix for the error: ", or set ...".

    Raises:
        UnavailableError: A CUDA tensor without a Triton that the kernels can use.
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
def triton_if_installed(name: str, what: str) -> ModuleType | None:
    """The Triton module of a kernel whose definition also works on GPUs, only slower; None without Triton, which is
    logged once.

    Args:
        name: The definition's module: "megatron_ep_v2.kernels.topk".
        what: What runs without Triton, for the log: "torch.topk finds each token's experts".
    """
    try:
        return importlib.import_module(f"{name}_triton")
    except ImportError as error:
        logger.warning("%s, more slowly than Triton 3.3 would: %s", what, error)
        return None
