"""The four raw buffer calls of a layer: the lower bound of every dispatcher on that buffer."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ep_v2.bench.layer import Groups, OurBuffer, named_results
from megatron_ep_v2.bench.shapes import Batch, Shape
from megatron_ep_v2.bench.variants import Variant
from megatron_ep_v2.fused_a2a import get_buffer
from megatron_ep_v2.probe import choose, probe


class RawLayer:
    """The four calls of one layer, one after the other on the buffer itself.

    dispatch; combine; cached dispatch (the combine's backward); combine with weights (the dispatch's backward).
    """

    def __init__(self, variant: Variant, batch: Batch, shape: Shape, sms: int | None, groups: Groups):
        assert variant.buffer is not None
        self.batch, self.num_experts = batch, shape.experts
        self.do_expand = variant.layout == "expanded"
        group = groups.get((variant.buffer, None))
        self.ours = OurBuffer(variant.buffer, variant.layout, sms, group, len(batch.hidden))
        choose(probe(), self.ours.settings, managed=True)  # raises if this buffer is not available
        self.outputs: tuple[torch.Tensor | None, ...] = ()

    @property
    def num_sms(self) -> int | None:
        return self.ours.num_sms

    @property
    def buffer_bytes(self) -> int | None:
        return self.ours.live.num_bytes if self.ours.live else None

    def enter(self) -> None:
        self.ours.enter()

    def leave(self) -> None:
        self.ours.leave()

    def run(self, *, backward: bool, count: int = 1) -> None:
        self.outputs = ()
        buffer = self.ours.live
        if buffer is None:
            batch = self.batch
            get_buffer(self.ours.group, batch.hidden, batch.topk_idx, self.num_experts, batch.weights)
            self.ours.enter()
            buffer = self.ours.live
            assert buffer is not None
        raw: Any = getattr(buffer, "_buffer", buffer)  # deep_ep's own object; the reference has none
        if not backward:
            for _ in range(count):
                self._forward(raw, buffer.num_sms)
            return
        layers = [self._forward(raw, buffer.num_sms) for _ in range(count)]
        while layers:
            self.outputs = self._backward(raw, *layers.pop())

    def _forward(self, raw: Any, num_sms: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
        batch = self.batch
        rows, _, row_weights, handle, _ = raw.dispatch(
            batch.hidden,
            topk_idx=batch.topk_idx,
            topk_weights=batch.weights,
            num_experts=self.num_experts,
            num_sms=num_sms,
            do_expand=self.do_expand,
        )
        y, _, _ = raw.combine(rows, handle)
        return y, row_weights, handle

    def _backward(self, raw: Any, y: torch.Tensor, row_weights: torch.Tensor, handle: Any) -> tuple[torch.Tensor, ...]:
        grad_rows, _, _, _, _ = raw.dispatch(
            self.batch.grad_output, handle=handle, num_sms=handle.num_sms, do_expand=self.do_expand
        )
        grad_hidden, grad_weights, _ = raw.combine(grad_rows, handle, topk_weights=row_weights)
        return y, grad_hidden, grad_weights

    def results(self) -> dict[str, torch.Tensor]:
        output, grad_hidden, grad_weights = self.outputs
        self.outputs = ()
        grad_probs = None
        if grad_weights is not None:
            grad_probs = torch.zeros_like(self.batch.probs).scatter_(1, self.batch.topk_idx, grad_weights)
        return named_results(output, grad_hidden, grad_probs, self.batch)

    def expected(self) -> dict[str, torch.Tensor]:
        return self.batch.expected(None if self.do_expand else self.ours.group.size())

    def close(self) -> None:
        pass
