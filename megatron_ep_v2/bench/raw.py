"""The four raw buffer calls as a variant of the table."""

from __future__ import annotations

import torch

from megatron_ep_v2.bench.calls import RawCalls, unwrapped
from megatron_ep_v2.bench.layer import Groups, OurBuffer, named_results
from megatron_ep_v2.bench.shapes import Batch, Shape
from megatron_ep_v2.bench.timing import repeated
from megatron_ep_v2.bench.variants import Variant
from megatron_ep_v2.fused_a2a import get_buffer
from megatron_ep_v2.probe import choose, probe


class RawLayer:
    """`calls.RawCalls` on the buffer itself; arguments as in `DispatcherLayer`."""

    def __init__(self, variant: Variant, batch: Batch, shape: Shape, sms: int | None, groups: Groups):
        assert variant.buffer is not None
        self.batch, self.num_experts = batch, shape.experts
        self.do_expand = variant.layout == "expanded"
        group = groups.get((variant.buffer, None))
        self.ours = OurBuffer(variant, sms, group, len(batch.hidden))
        choose(probe(), self.ours.settings, managed=True)  # raises where this buffer is not here
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
        calls = RawCalls(
            buffer=unwrapped(buffer),
            hidden=self.batch.hidden,
            grad_output=self.batch.grad_output,
            topk_idx=self.batch.topk_idx,
            topk_weights=self.batch.weights,
            num_experts=self.num_experts,
            do_expand=self.do_expand,
            num_sms=buffer.num_sms,
        )
        if backward:
            self.outputs = calls.backward([calls.forward() for _ in range(count)])
        else:
            repeated(calls.forward, count)

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
