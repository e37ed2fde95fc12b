"""What every measured layer is: the protocol, and what the variants on this package's own buffers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2 import settings as settings_module
from megatron_ep_v2.bench.calls import unwrapped
from megatron_ep_v2.bench.shapes import Batch
from megatron_ep_v2.bench.variants import Variant
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.buffers.contract import Buffer, BufferSpec
from megatron_ep_v2.probe import probe
from megatron_ep_v2.settings import Settings
from megatron_ep_v2.watchdog.watched_buffer import WatchedBuffer


class Layer(Protocol):
    """A variant that can be run.

    Attributes:
        num_sms: SMs that its communication takes, as far as that is known.
        buffer_bytes: Memory of its buffer, as far as that is known.
    """

    @property
    def num_sms(self) -> int | None: ...
    @property
    def buffer_bytes(self) -> int | None: ...

    def enter(self) -> None:
        """Put in force what this variant needs; the ones before it had their own."""

    def leave(self) -> None:
        """Keep what this variant may need again."""

    def run(self, *, backward: bool, count: int = 1) -> None:
        """`count` layers forward without a pause; with `backward`, then all of them backward, as in training."""

    def results(self) -> dict[str, torch.Tensor]:
        """Output and gradients of a layer of the last run with backward, by the names of `Batch.expected`; afterwards
        they are gone."""

    def expected(self) -> dict[str, torch.Tensor]:
        """What `results` must be, in fp64."""

    def close(self) -> None:
        """Release what is not in this package's pool; collective."""


class Entered(Protocol):
    """What has to be put in force before it runs."""

    def enter(self) -> None: ...
    def leave(self) -> None: ...


E = TypeVar("E", bound=Entered)
T = TypeVar("T")


def within(layer: E, action: Callable[[E], T]) -> T:
    """What `action(layer)` returns, with the layer in force."""
    layer.enter()
    try:
        return action(layer)
    finally:
        layer.leave()


class Groups:
    """The process groups of a benchmark: each kind of buffer needs one of its own, for the pool holds one per group."""

    def __init__(self) -> None:
        self.alone = _new_group([dist.get_rank()])
        self.hybrid_buffers: dict[int | None, object] = {}  # HybridEP's, by SM count; Megatron holds only one at a time
        # Megatron's own dispatchers have no buffer in the pool, so they share the world with DeepEP V2's.
        world, sharing = dist.group.WORLD, ("megatron", probe().v2_carrier)
        assert world is not None  # the ranks have joined it
        self._by_kind: dict[tuple[str | None, int | None], ProcessGroup] = {(kind, None): world for kind in sharing}

    def get(self, kind: tuple[str, int | None]) -> ProcessGroup:
        """The group of a kind of buffer (its name, and its SM count if it is fixed) over all ranks; collective for a
        new kind."""
        if kind not in self._by_kind:
            self._by_kind[kind] = _new_group()
        return self._by_kind[kind]


def _new_group(ranks: list[int] | None = None) -> ProcessGroup:
    """A group of these ranks, by default of all; only they call."""
    group = dist.new_group(ranks, use_local_synchronization=ranks is not None)
    assert isinstance(group, ProcessGroup)  # other ranks would get a number
    return group


class OurBuffer:
    """What variants on this package's buffers share: which buffer, and on how many SMs.

    Args:
        tokens: Most that a rank dispatches. A setting, so that no dispatch asks the other ranks for theirs.

    Attributes:
        num_sms: SMs of this variant's calls; before the first one, what it asks for. The buffer itself knows only those
            of the variant that ran last.
    """

    def __init__(self, variant: Variant, sms: int | None, group: ProcessGroup, tokens: int):
        assert variant.buffer is not None
        self.group, self.kind, self.num_sms = group, variant.buffer, sms
        self.settings: Settings = settings_module.resolve(
            None,
            **variant.installed_with,
            num_sms=sms,
            num_max_tokens_per_rank=tokens,
            reference_strict=False,  # fp32, in which a wrong result shows best, and any hidden size
        )

    @property
    def live(self) -> Buffer | None:
        """The buffer itself, below the watchdog that dispatchers find in the pool; None before the first
        call."""
        found = pool.find(self.group)
        return found.buffer if isinstance(found, WatchedBuffer) else found

    def enter(self) -> None:
        """Its settings are read when the buffer is built; afterwards it gets the SM count of this variant."""
        settings_module.activate(self.settings)
        buffer = self.live
        if buffer is None:
            return
        if CARRIERS[self.kind].fixed_sms:
            type(unwrapped(buffer)).set_num_sms(buffer.num_sms)
        elif CARRIERS[self.kind].needs_cuda:
            spec: BufferSpec = vars(buffer)["spec"]
            buffer.num_sms = self.settings.num_sms or buffer.get_theoretical_num_sms(spec.num_experts, spec.num_topk)
        self.num_sms = buffer.num_sms

    def leave(self) -> None:
        """After a run: the first one has built the buffer."""
        if self.live is not None:
            self.num_sms = self.live.num_sms


def named_results(
    output: torch.Tensor | None, grad_hidden: torch.Tensor | None, grad_probs: torch.Tensor | None, batch: Batch
) -> dict[str, torch.Tensor]:
    """By the names of `Batch.expected`; a gradient that never came is zero."""
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
