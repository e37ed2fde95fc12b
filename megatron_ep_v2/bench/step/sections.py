"""How much of a step goes by in dispatch and combine: stamps where the hidden states enter and leave a dispatcher."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from megatron_ep_v2.gradients import Context, InputGrads

if TYPE_CHECKING:  # importing it imports Megatron
    from megatron_ep_v2.megatron.standalone import Dispatcher

Stamp: TypeAlias = Any  # an event on a GPU, seconds on a CPU


class Stopwatch:
    """Spans by name, of a device's stream on a GPU and of the clock on a CPU.

    A span of the forward begins where the hidden states go in; the backward's span of the same name begins where their
    gradient comes in at the other end.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._open: dict[str, list[Stamp]] = {}
        self._spans: dict[str, list[tuple[Stamp, Stamp]]] = {}

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
            now: Stamp = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if opens:
            self._open.setdefault(name, []).append(now)
        else:
            self._spans.setdefault(name, []).append((self._open[name].pop(), now))


class _MarkContext(Context, Protocol):
    watch: Stopwatch
    name: str
    opens: bool


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _MarkContext, hidden: torch.Tensor, watch: Stopwatch, name: str, opens: bool) -> torch.Tensor:
        ctx.watch, ctx.name, ctx.opens = watch, name, opens
        watch._stamp(name, opens)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: _MarkContext, grad: torch.Tensor) -> InputGrads:
        ctx.watch._stamp(ctx.name, not ctx.opens)
        return grad, None, None, None


class Watched:
    """A token dispatcher with stamps around its dispatch and its combine; everything else is its own."""

    def __init__(self, dispatcher: Dispatcher, watch: Stopwatch):
        self._dispatcher, self._watch = dispatcher, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dispatcher, name)

    def dispatch_preprocess(self, hidden: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._dispatcher.dispatch_preprocess(self._watch.begin("dispatch", hidden), *rest)

    def dispatch_postprocess(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, *rest = self._dispatcher.dispatch_postprocess(*arguments)
        return self._watch.end("dispatch", rows), *rest

    def combine_preprocess(self, rows: torch.Tensor) -> torch.Tensor:
        return self._dispatcher.combine_preprocess(self._watch.begin("combine", rows))

    def combine_postprocess(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._watch.end("combine", self._dispatcher.combine_postprocess(hidden))
