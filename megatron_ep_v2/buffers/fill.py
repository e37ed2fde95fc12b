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
from typing import Any, TypeVar

import torch

logger = logging.getLogger("megatron_ep_v2")

T = TypeVar("T")

_mode: Any = torch.utils.deterministic


def memory_left_as_it_is(call: Callable[..., T]) -> Callable[..., T]:
    """A call of deep_ep, during which torch's fill is off; the call itself where it is off anyway. Ask for each call:
    the mode may be turned on at any time."""
    if not (torch.are_deterministic_algorithms_enabled() and _mode.fill_uninitialized_memory):
        return call
    return functools.partial(_call_unfilled, call)


def _call_unfilled(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    _say_so()
    _mode.fill_uninitialized_memory = False  # a property of the module
    try:
        return call(*args, **kwargs)
    finally:
        _mode.fill_uninitialized_memory = True


@functools.cache
def _say_so() -> None:
    """Once, not in every call."""
    logger.info(
        "torch's deterministic mode fills uninitialised memory; what deep_ep allocates is left out, because deep_ep "
        "may be writing there at the same time"
    )
