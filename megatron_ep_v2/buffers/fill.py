"""Keeping torch's deterministic mode off the memory that deep_ep receives in.

Under `torch.use_deterministic_algorithms(True)`, torch fills everything that it allocates without a value
(`fill_uninitialized_memory`, on by default): a kernel on the current stream, beside the communication that writes
there. deep_ep refuses to be called like that, with a bare assertion. So the fill is off while deep_ep is called, and
only then; what deep_ep allocates it also writes, but for padding rows, which are zeroed where anybody reads them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

import torch

logger = logging.getLogger("megatron_ep_v2")


@contextlib.contextmanager
def memory_left_as_it_is() -> Iterator[None]:
    """Torch's fill is off inside, wherever and whenever deterministic mode was turned on."""
    mode = torch.utils.deterministic
    if not (torch.are_deterministic_algorithms_enabled() and mode.fill_uninitialized_memory):  # type: ignore[attr-defined]
        yield
        return
    _say_so()
    mode.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    try:
        yield
    finally:
        mode.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@functools.cache
def _say_so() -> None:
    """Once, not in every call."""
    logger.info(
        "torch's deterministic mode fills uninitialised memory; what deep_ep allocates is left out, because deep_ep "
        "may be writing there at the same time"
    )
