"""The interface of a measured layer, and the shared part of variants on this package's buffers."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_ep_v2 import settings as settings_module
from megatron_ep_v2.bench.shapes import Batch
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.settings import Settings
from megatron_ep_v2.watchdog.watched_buffer import WatchedBuffer


class Layer(Protocol):
    """A variant that can be run.

    Attributes:
        num_sms: SMs that its communication uses; None = unknown.
        buffer_bytes: Memory of its buffer; None = unknown.
    """

    @property
    def num_sms(self) -> int | None: ...
    @property
    def buffer_bytes(self) -> int | None: ...

    def enter(self) -> None:
        """Activate this variant's bindings and settings."""

    def leave(self) -> None:
        """Deactivate them, and keep state for the next `enter`."""

    def run(self, *, backward: bool, count: int = 1) -> None:
        """Run `count` layers forward without a pause; with `backward`, then all of them backward, as in training."""

    def results(self) -> dict[str, torch.Tensor]:
        """Take output and gradients of a layer of the last run with backward, by the names of `Batch.expected`. A
        second call has none."""

    def expected(self) -> dict[str, torch.Tensor]:
        """Expected `results`, in fp64."""

    def close(self) -> None:
        """Release state that is not in this package's pool; collective."""


class Groups:
    """The process groups of a benchmark: one for each kind of buffer, because the pool holds one buffer per group."""

    def __init__(self) -> None:
        self.alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        self.hybrid_buffers: dict[int | None, Any] = {}  # HybridEP's, by SM count; Megatron holds one at a time
        # Megatron's own dispatchers have no buffer in the pool, so they share the world with ElasticBuffer.
        self._by_kind: dict[Any, Any] = {("megatron", None): dist.group.WORLD, ("elastic", None): dist.group.WORLD}

    def get(self, kind: Any) -> Any:
        """The group of a kind of buffer over all ranks; collective for a new kind."""
        if kind not in self._by_kind:
            self._by_kind[kind] = dist.new_group()
        return self._by_kind[kind]


class OurBuffer:
    """Buffer and SM count of a variant on this package's buffers.

    Args:
        tokens: Most tokens that a rank dispatches. Passed as a setting, so that no dispatch gathers it from the ranks.

    Attributes:
        num_sms: SMs of this variant's calls; before the first call, the requested count. The buffer itself has the
            count of the variant that ran last.
    """

    def __init__(self, kind: str, layout: str | None, sms: int | None, group: Any, tokens: int):
        self.group, self.kind, self.num_sms = group, kind, sms
        self.settings: Settings = settings_module.resolve(
            buffer=kind,
            layout=layout,
            num_sms=sms,
            num_max_tokens_per_rank=tokens,
            reference_strict=False,  # allows fp32, in which wrong results show best, and any hidden size
        )

    @property
    def live(self) -> Any:
        """The `contract.Buffer`, without the watchdog around it; None before the first call."""
        found = pool.find(self.group)
        return found.buffer if isinstance(found, WatchedBuffer) else found

    def enter(self) -> None:
        """Activate the settings, which are read when the buffer is built; a built buffer gets this variant's SM
        count."""
        settings_module.activate(self.settings)
        buffer = self.live
        if buffer is None:
            return
        if self.kind == "elastic":
            buffer.num_sms = self.settings.num_sms or buffer.get_theoretical_num_sms(
                buffer.spec.num_experts, buffer.spec.num_topk
            )
        elif self.kind == "legacy":
            type(buffer._buffer).set_num_sms(buffer.num_sms)
        self.num_sms = buffer.num_sms

    def leave(self) -> None:
        """Record the SM count after a run; the first run has built the buffer."""
        if self.live is not None:
            self.num_sms = self.live.num_sms


def named_results(
    output: torch.Tensor | None, grad_hidden: torch.Tensor | None, grad_probs: torch.Tensor | None, batch: Batch
) -> dict[str, torch.Tensor]:
    """Results by the names of `Batch.expected`; a missing gradient is zero."""
    found = (output, grad_hidden, grad_probs)
    expected = {
        "output": batch.hidden,
        "gradient of hidden states": batch.hidden,
        "gradient of probabilities": batch.probs,
    }
    return {
        name: torch.zeros_like(like) if tensor is None else tensor
        for (name, like), tensor in zip(expected.items(), found, strict=True)
    }
