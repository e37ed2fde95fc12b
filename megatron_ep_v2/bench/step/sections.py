"""How much of a step goes by in dispatch and combine: stamps where the hidden states enter and leave a dispatcher."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Spans by name, of a device's stream on a GPU and of the clock on a CPU.

    A span of the forward begins where the hidden states go in; the backward's span of the same name begins where their
    gradient comes in at the other end.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._open: dict[str, list[Any]] = {}
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    def begin(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` goes into the section."""
        return _Mark.apply(hidden, self, name, True)

    def end(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` has come out of the section."""
        return _Mark.apply(hidden, self, name, False)

    def milliseconds(self) -> dict[str, float]:
        """In all spans of each name together; on a GPU, once the device is idle."""
        return {
            name: sum(a.elapsed_time(b) if self.on_gpu else (b - a) * 1e3 for a, b in spans)
            for name, spans in self._spans.items()
        }

    def _stamp(self, name: str, opens: bool) -> None:
        if self.on_gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if opens:
            self._open.setdefault(name, []).append(now)
        else:
            self._spans.setdefault(name, []).append((self._open[name].pop(), now))


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, watch: Stopwatch, name: str, opens: bool) -> torch.Tensor:
        ctx.watch, ctx.name, ctx.opens = watch, name, opens
        watch._stamp(name, opens)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.watch._stamp(ctx.name, not ctx.opens)
        return grad, None, None, None


class Watched:
    """A token dispatcher with stamps around its dispatch and its combine; everything else is its own."""

    def __init__(self, dispatcher: Any, watch: Stopwatch):
        self._dispatcher, self._watch = dispatcher, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dispatcher, name)

    def dispatch_preprocess(self, hidden: torch.Tensor, *rest: Any) -> Any:
        return self._dispatcher.dispatch_preprocess(self._watch.begin("dispatch", hidden), *rest)

    def dispatch_postprocess(self, *arguments: Any) -> Any:
        rows, *rest = self._dispatcher.dispatch_postprocess(*arguments)
        return self._watch.end("dispatch", rows), *rest

    def combine_preprocess(self, rows: torch.Tensor) -> Any:
        return self._dispatcher.combine_preprocess(self._watch.begin("combine", rows))

    def combine_postprocess(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._watch.end("combine", self._dispatcher.combine_postprocess(hidden))
