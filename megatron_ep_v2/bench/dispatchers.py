"""One layer of a Megatron dispatcher: dispatch, experts that pass rows through, combine, and their backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_ep_v2.bench.layer import Groups, OurBuffer, named_results
from megatron_ep_v2.bench.shapes import Batch, Shape
from megatron_ep_v2.bench.variants import Variant, make_dispatchers
from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.buffers.redundancy import slot_bytes
from megatron_ep_v2.settings import Settings

# Rows received by the busiest rank, as a multiple of the mean, get this much room in buffers of a fixed size.
_HEADROOM = 1.05


class DispatcherSet:
    """Megatron token dispatchers of one variant, one for each layer, and what must be in force while they run.

    Args:
        variant: Which.
        shape: Of the layers.
        dtype: Of the hidden states.
        sms: SM count, None = the library's own choice.
        load: Selections received by the busiest rank, as a multiple of the mean.
        groups: Where to take process groups from.
        tokens: Most that a rank dispatches.
        layers: How many.

    Raises:
        EPError, ImportError, ValueError, AssertionError: This environment does not offer the variant.
    """

    def __init__(
        self,
        variant: Variant,
        shape: Shape,
        dtype: torch.dtype,
        sms: int | None,
        load: float,
        groups: Groups,
        tokens: int,
        layers: int = 1,
    ):
        from megatron_ep_v2.megatron import standalone

        self.variant, self.sms = variant, sms
        self.backend = variant.backend if variant.kind == "flex" else ""
        fixed_sms = variant.buffer is not None and CARRIERS[variant.buffer].fixed_sms
        kind = variant.buffer or "megatron"
        if variant.redundant_experts:  # a buffer of its own
            kind = f"{kind}, {variant.redundant_experts} replica slots"
        group = groups.get((kind, sms if fixed_sms else None))
        self.ours = OurBuffer(variant, sms, group, tokens) if variant.buffer else None
        config: dict[str, object] = {}
        if self.ours is None and sms is not None:
            config[standalone.sms_field(variant.backend)] = sms
        if variant.redundant_experts:
            config["moe_ffn_hidden_size"] = shape.expert_ffn
        if variant.overlap:
            config["moe_shared_expert_intermediate_size"] = shape.shared_ffn
        if variant.backend == "ncclep":
            config["moe_expert_rank_capacity_factor"] = _HEADROOM * load
        self.dispatchers, self._bindings = make_dispatchers(
            variant,
            layers,
            group,
            groups.alone,
            hidden=shape.hidden,
            experts=shape.experts,
            topk=shape.topk,
            dtype=dtype,
            **config,
        )
        self._hybrid_buffers = groups.hybrid_buffers
        if variant.kind == "allgather":
            standalone.ensure_global_memory_buffer()

    def run_shared_experts(self, layers: Sequence[Any]) -> None:
        """Let the dispatchers run the shared experts of these layers (Megatron's MoELayer), if the variant overlaps."""
        if self.variant.overlap:
            for dispatcher, layer in zip(self.dispatchers, layers, strict=True):
                dispatcher.set_shared_experts(layer.shared_experts)
                if self.variant.waits:
                    vars(dispatcher)["_comm_manager"].starts = False

    @property
    def num_sms(self) -> int | None:
        return self.ours.num_sms if self.ours else self.sms

    @property
    def buffer_bytes(self) -> int | None:
        buffer = self.ours.live if self.ours else None
        return buffer.num_bytes if buffer else None

    @property
    def settings(self) -> Settings:
        """Those of this package in force while it runs."""
        assert self.ours is not None
        return self.ours.settings

    @property
    def slot_bytes(self) -> int:
        """Memory of the replica slots; 0 without."""
        buffer = self.ours.live if self.ours else None
        if buffer is None:
            return 0
        spec: BufferSpec = vars(buffer)["spec"]
        return slot_bytes(spec.redundancy) if spec.redundancy else 0

    def enter(self) -> None:
        from megatron_ep_v2.megatron.standalone import fused_a2a, token_dispatcher

        for owner, name, _, ours in self._bindings:
            setattr(owner, name, ours)
        if self.ours:
            self.ours.enter()
        elif self.backend == "hybridep":
            fused_a2a._hybrid_ep_buffer = self._hybrid_buffers.get(self.sms)  # None: made at the next call
        elif self.backend == "deepep" and token_dispatcher.set_deepep_num_sms is not None:
            token_dispatcher.set_deepep_num_sms(self.sms or 20)

    def leave(self) -> None:
        from megatron_ep_v2.megatron.standalone import fused_a2a

        for owner, name, theirs, _ in reversed(self._bindings):
            setattr(owner, name, theirs)
        if self.ours:
            self.ours.leave()
        elif self.backend == "hybridep":
            self._hybrid_buffers[self.sms], fused_a2a._hybrid_ep_buffer = fused_a2a._hybrid_ep_buffer, None

    def close(self) -> None:
        self._hybrid_buffers.clear()
        if self.backend == "ncclep":
            from megatron_ep_v2.megatron.standalone import fused_a2a

            fused_a2a.nccl_ep_finalize()


class DispatcherLayer(DispatcherSet):
    """A Megatron token dispatcher around experts that pass rows through, unweighted; arguments as in `DispatcherSet`.

    Args:
        batch: This rank's tokens.
    """

    def __init__(self, variant: Variant, batch: Batch, shape: Shape, sms: int | None, load: float, groups: Groups):
        super().__init__(variant, shape, batch.hidden.dtype, sms, load, groups, len(batch.hidden))
        self.batch, self.dispatcher = batch, self.dispatchers[0]
        self.outputs: tuple[torch.Tensor | None, ...] = (None, None, None)

    def run(self, *, backward: bool, count: int = 1) -> None:
        self.outputs = (None, None, None)
        if not backward:
            for _ in range(count):
                self._forward()
            return
        layers = [self._forward() for _ in range(count)]
        ends = [end for *_, y, row_probs in layers for end in (y, row_probs)]
        gradients = [g for *_, row_probs in layers for g in (self.batch.grad_output, row_probs.detach())]
        torch.autograd.backward(ends, gradients)
        hidden, probs, y, _ = layers[-1]
        self.outputs = (y.detach(), hidden.grad, probs.grad)

    def _forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Leaves of its own, since gradients of several layers would be added up; output; the rows' probabilities."""
        hidden, probs = (x.detach().requires_grad_() for x in (self.batch.hidden, self.batch.probs))
        dispatcher = self.dispatcher
        rows, sent_probs = dispatcher.dispatch_preprocess(hidden, self.batch.routing_map, probs)
        rows, row_probs = dispatcher.token_dispatch(rows, sent_probs)
        rows, _, row_probs = dispatcher.dispatch_postprocess(rows, row_probs)
        y = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))
        return hidden, probs, y, row_probs

    def results(self) -> dict[str, torch.Tensor]:
        (output, grad_hidden, grad_probs), self.outputs = self.outputs, (None, None, None)
        return named_results(output, grad_hidden, grad_probs, self.batch)

    def expected(self) -> dict[str, torch.Tensor]:
        return self.batch.expected()
