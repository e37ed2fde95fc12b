"""A buffer that keeps what a started call brings where the next call writes, as DeepEP does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

import torch

from megatron_ep_v2.buffers.pending import Pending, Starter
from megatron_ep_v2.buffers.reference import ReferenceBuffer


class OneMemory(ReferenceBuffer):
    """Rows are gone, NaN, if a started call was not finished before the next one. What goes into a started call must
    not change until then; that is looked at when it is finished.

    Attributes:
        order: What all buffers of this process were asked for, in order, with what the test adds.
    """

    order: ClassVar[list[str]] = []

    def start_dispatch(self, x: Any, **arguments: Any) -> Pending[Any]:
        name = "dispatch" if arguments.get("handle") is None else "cached dispatch"
        return self._bring(name, x, self.dispatch(x, **arguments))

    def start_combine(self, x: Any, *rest: Any, **arguments: Any) -> Pending[Any]:
        return self._bring("combine", x, self.combine(x, *rest, **arguments))

    def dispatch(self, *args: Any, **arguments: Any) -> Any:
        self._overwrite()
        return super().dispatch(*args, **arguments)

    def combine(self, *args: Any, **arguments: Any) -> Any:
        self._overwrite()
        return super().combine(*args, **arguments)

    def _bring(self, name: str, x: Any, brought: Any) -> Pending[Any]:
        rows = brought[0]
        vars(self).setdefault("landed", []).append(rows)
        sent = x if isinstance(x, tuple) else (x,)
        as_sent = [each.clone() for each in sent]
        self.order.append(f"{name} starts")

        def finish() -> Any:
            assert all(map(torch.equal, sent, as_sent)), f"what went into the {name} has changed before its end"
            self.landed = [other for other in self.landed if other is not rows]
            self.order.append(f"{name} ends")
            return brought

        return Pending(finish)

    def _overwrite(self) -> None:
        for rows in vars(self).get("landed", []):
            for each in rows if isinstance(rows, tuple) else (rows,):
                each.view(torch.uint8).fill_(0xFF)  # NaN


class Finishing(Starter, OneMemory):
    """Finishes a started call before the next one, as `EPBuffer` does."""

    def dispatch(self, *args: Any, **arguments: Any) -> Any:
        self._finish_started()
        return super().dispatch(*args, **arguments)

    def combine(self, *args: Any, **arguments: Any) -> Any:
        self._finish_started()
        return super().combine(*args, **arguments)

    def _bring(self, *args: Any) -> Pending[Any]:
        return self._start(super()._bring(*args).wait)


@contextlib.contextmanager
def in_one_memory(kind: type[OneMemory] = Finishing) -> Iterator[list[str]]:
    """Reference buffers that are built in here are of this kind. Yields their `order`, empty."""
    OneMemory.order.clear()
    with mock.patch("megatron_ep_v2.buffers.reference.ReferenceBuffer", kind):
        yield OneMemory.order
