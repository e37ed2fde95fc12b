"""A buffer whose capacity the ranks raise together, for batches whose largest size is not known beforehand.

Packed fine-tuning and RL have micro-batches of any length, so the first one says little about the largest. So each
forward dispatch that may wait on the host begins with one small all-reduce: the most tokens of any rank. If they are
more than the buffer holds, all ranks build a larger one and continue. A handle belongs to the buffer that made it: its
combine and both backwards still use that one. The all-reduce also says whether any rank has a handle of an old buffer.
If none has, the old ones are destroyed, which is collective; else they are destroyed with the group's buffers.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers.checks import CAPACITY_VARIABLE, check_group_open
from megatron_ep_v2.buffers.contract import (
    Buffer,
    BufferSpec,
    Combined,
    DeferringBuffer,
    Dispatched,
    Handle,
    Payload,
    Slots,
)
from megatron_ep_v2.buffers.pending import Pending, Starter

logger = logging.getLogger("megatron_ep_v2")


class GrowingBuffer(Starter):
    """`contract.Buffer` on a list of buffers: the newest dispatches, and the one that made a handle serves the handle.

    Dispatches that must not wait (`do_cpu_sync=False`, a CUDA graph is captured) skip the all-reduce: a rank with too
    many tokens raises, as with any buffer. So do dispatches with an explicit capacity.

    Args:
        build: Builds a buffer; collective.
        spec: Of the first buffer.

    Attributes:
        buffer: The newest buffer.
        grown_from: Capacity of the first one; 0 while it is the newest.
        comm_stream: None: each buffer has its own stream, and the current one waits for it.
    """

    comm_stream: torch.cuda.Stream | None = None

    def __init__(self, build: Callable[[BufferSpec], Buffer], spec: BufferSpec):
        self._build, self._spec = build, spec
        self._old: list[_Made] = []
        self._newest = _Made(build(spec))
        self._destroyed, self.grown_from = False, 0

    @property
    def buffer(self) -> Buffer:
        return self._newest.buffer

    @property
    def num_bytes(self) -> int:
        """Device memory of all live buffers."""
        return sum(made.buffer.num_bytes for made in (*self._old, self._newest))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy has no attributes yet, and would recurse for ever
            raise AttributeError(name)
        return getattr(self._newest.buffer, name)

    def dispatch(self, x: Payload, **arguments: Any) -> Any:
        """See `contract.Buffer.dispatch`.

        Raises:
            UnavailableError: A larger buffer cannot be built.
        """
        made = self._chosen(x, arguments)
        answer = made.buffer.dispatch(x, **arguments)
        made.note(answer[3])
        return answer

    def start_dispatch(self, x: Payload, **arguments: Any) -> Pending[Dispatched]:
        """See `contract.DeferringBuffer.start_dispatch`. Without a handle, the all-reduce of the capacity waits on the
        host. Raises as `dispatch`."""
        made = self._chosen(x, arguments)
        pending = cast(DeferringBuffer, made.buffer).start_dispatch(x, **arguments)

        def finish() -> Dispatched:
            answer = pending.wait()
            made.note(answer[3])
            return answer

        return self._start(finish)

    def _chosen(self, x: Payload, arguments: dict[str, Any]) -> _Made:
        """The buffer that dispatches."""
        self._finish_started()
        rows, handle = x[0] if isinstance(x, tuple) else x, arguments.get("handle")
        captured = _captured(rows)
        may_wait = arguments.get("do_cpu_sync", True) and not captured
        if handle is None and may_wait and not arguments.get("num_max_tokens_per_rank") and not self._destroyed:
            self._agree(rows)
        made = self._newest if handle is None else self._maker(handle)
        made.captured |= captured
        return made

    def combine(
        self, x: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None = None, **arguments: Any
    ) -> Any:
        """See `contract.Buffer.combine`."""
        self._finish_started()
        made = self._maker(handle)
        made.captured |= _captured(x)
        return made.buffer.combine(x, handle, topk_weights, **arguments)

    def start_combine(
        self, x: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None = None, **arguments: Any
    ) -> Pending[Combined]:
        """See `contract.DeferringBuffer.start_combine`."""
        self._finish_started()
        buffer = cast(DeferringBuffer, self._maker(handle).buffer)
        return self._start(buffer.start_combine(x, handle, topk_weights, **arguments).wait)

    def prefetch_weights(self, slots: Slots, weights: Sequence[torch.Tensor], mapping: torch.Tensor) -> Any:
        """See `contract.RedundantBuffer.prefetch_weights`; on the buffer that the slots belong to. `slots()` are the
        newest buffer's."""
        return self._with(lambda own: slots is own).prefetch_weights(slots, weights, mapping)

    def reduce_grads(self, slot_grads: torch.Tensor, grads: torch.Tensor, mapping: torch.Tensor) -> Any:
        """See `contract.RedundantBuffer.reduce_grads`; on the buffer that the slots belong to."""
        owner = self._with(lambda own: any(slot_grads is each for each in own.grads))
        return owner.reduce_grads(slot_grads, grads, mapping)

    def _with(self, owns: Callable[[Slots], bool]) -> Any:
        """The buffer whose slots pass; the newest, which then refuses the call, if there is none."""
        buffers: list[Any] = [made.buffer for made in (self._newest, *self._old)]
        return next((each for each in buffers if owns(each.slots())), buffers[0])

    def destroy(self) -> None:
        """Destroy all buffers, newest first. Collective."""
        self._destroyed = True
        try:
            self._newest.buffer.destroy()
        finally:
            self._destroy_old()

    def _maker(self, handle: Handle) -> _Made:
        return getattr(handle, "maker", self._newest)

    def _agree(self, rows: torch.Tensor) -> None:
        """Build a larger buffer if a rank has more tokens, and destroy the old ones once no rank needs them."""
        check_group_open(self.group)
        most, old_needed = self._gather(rows, any(made.needed() for made in self._old))
        if self._old and not old_needed:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # the last kernels of an old buffer may still run
            self._destroy_old()
        if most > self._spec.num_max_tokens_per_rank:
            self._grow(most)

    def _gather(self, rows: torch.Tensor, old_needed: bool) -> tuple[int, bool]:
        """The most tokens of any rank, and whether any needs an old buffer."""
        num_tokens, buffer = rows.shape[0] if rows.dim() else 0, self._newest.buffer
        gather_numbers = getattr(buffer, "gather_numbers", None)
        if gather_numbers is not None:  # the reference's, which names a rank that is in another call
            gathered = gather_numbers(2 * num_tokens + old_needed, rows.device)
            return max(gathered) // 2, any(value % 2 for value in gathered)
        stream = buffer.comm_stream
        wanted = torch.tensor([num_tokens, int(old_needed)], device=stream.device if stream else rows.device)
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self.group)
        most, needed = wanted.tolist()
        return most, bool(needed)

    def _grow(self, most: int) -> None:
        before, capacity = self._spec.num_max_tokens_per_rank, round_up(most)
        spec = replace(self._spec, num_max_tokens_per_rank=capacity)
        grown = _Made(self._build(spec))
        self._old.append(self._newest)
        self._spec, self._newest, self.grown_from = spec, grown, self.grown_from or before
        logger.log(
            logging.WARNING if settings.is_first_rank() else logging.INFO,
            "the expert-parallel group's num_max_tokens_per_rank grows from %d to %d, because a rank has %d tokens to "
            "dispatch; set %s=%d (the same on every rank) to start with that capacity",
            before,
            capacity,
            most,
            CAPACITY_VARIABLE,
            capacity,
        )

    def _destroy_old(self) -> None:
        for made in reversed(self._old):
            made.buffer.destroy()
        self._old.clear()


class _Made:
    """A buffer and its live handles.

    Attributes:
        captured: A CUDA graph has recorded calls of it. It is needed for ever, because any replay may be followed by
            another.
    """

    def __init__(self, buffer: Buffer):
        self.buffer, self.captured = buffer, False
        self._handles: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()  # not hashable: by id()

    def note(self, handle: Handle) -> None:
        """Remember a handle that the buffer returned; a cached dispatch may return the handle that it was given."""
        vars(handle)["maker"] = self
        self._handles[id(handle)] = handle

    def needed(self) -> bool:
        return self.captured or len(self._handles) > 0


def round_up(tokens: int) -> int:
    """The next power of two, or three quarters of it.

    Each growth costs seconds (a buffer is built, deep_ep compiles kernels for it), so it must not happen for each batch
    that is a little larger. Two growths at least double the capacity, and at most a third of the memory is unused. Few
    values also mean that kernels from an earlier job are found in deep_ep's cache.
    """
    power = 1 << max(0, tokens - 1).bit_length()
    return power // 4 * 3 if tokens <= power // 4 * 3 else power


def _captured(rows: torch.Tensor) -> bool:
    """Whether a CUDA graph is capturing the calls on these rows."""
    return rows.is_cuda and torch.cuda.is_current_stream_capturing()
