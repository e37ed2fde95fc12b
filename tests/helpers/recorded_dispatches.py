"""The dispatches of a buffer, first ones and cached ones, and which of their handles live on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_ep_v2.buffers.reference import ReferenceBuffer


@contextmanager
def recorded(kind: Any = ReferenceBuffer) -> Iterator[tuple[list[str], list[Any]]]:
    """(each dispatch as "first" or "cached" and "gradient", weak references to the handles of the first ones)."""
    calls: list[str] = []
    handles: list[Any] = []
    dispatch = kind.dispatch

    def seen(self: Any, x: Any, **arguments: Any) -> Any:
        answer = dispatch(self, x, **arguments)
        if arguments.get("handle") is None:
            calls.append("first")
            handles.append(weakref.ref(answer[3]))
        else:
            calls.append("cached" if arguments.get("topk_weights") is not None else "gradient")
        return answer

    kind.dispatch = seen
    try:
        yield calls, handles
    finally:
        kind.dispatch = dispatch


def alive(handles: list[Any]) -> int:
    gc.collect()
    return sum(handle() is not None for handle in handles)
