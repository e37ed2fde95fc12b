"""Keeping torch's deterministic mode off the memory that deep_ep receives in.

Under `torch.use_deterministic_algorithms(True)`, torch fills everything that it allocates without a value
(`fill_uninitialized_memory`, on by default): a kernel on the current stream, beside the communication that writes
there. deep_ep refuses to be called like that, with a bare assertion. So the fill is off while deep_ep is called, and
only then; what deep_ep allocates it also writes, but for padding rows, which are zeroed where anybody reads them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

logger = logging.getLogger("megatron_ep_v2")

P = ParamSpec("P")
T = TypeVar("T")


def memory_left_as_it_is(call: Callable[P, T]) -> Callable[P, T]:
    """Decorates a call of deep_ep: torch's fill is off inside, whenever and wherever its mode was turned on."""

    @functools.wraps(call)
    def unfilled(*args: P.args, **kwargs: P.kwargs) -> T:
        mode = torch.utils.deterministic
        if not (torch.are_deterministic_algorithms_enabled() and mode.fill_uninitialized_memory):  # type: ignore[attr-defined]
            return call(*args, **kwargs)
        _say_so()
        mode.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
        try:
            return call(*args, **kwargs)
        finally:
            mode.fill_uninitialized_memory = True  # type: ignore[attr-defined]

    return unfilled


@functools.cache
def _say_so() -> None:
    """Once, not in every call."""
    logger.info(
        "torch's deterministic mode fills uninitialised memory; what deep_ep allocates is left out, because deep_ep "
        "may be writing there at the same time"
    )
