"""`EPBuffer` (DeepEP 2.5, of the package deep_ep or deep_ep_v25) as a buffer of the contract: the wrapper of 2.1's
ElasticBuffer, with what 2.5 does differently.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.buffers.checks import check_group_open
from megatron_ep_v2.buffers.contract import (
    BufferSpec,
    Combined,
    Dispatched,
    Handle,
    Payload,
    Redundancy,
    Slots,
    Transfer,
)
from megatron_ep_v2.buffers.deep_ep import memory_left_as_it_is
from megatron_ep_v2.buffers.elastic import ElasticBuffer
from megatron_ep_v2.buffers.pending import Pending, Starter
from megatron_ep_v2.buffers.redundancy import (
    ALIGNMENT,
    carve,
    check_one_host,
    check_prefetch,
    check_reduce,
    slot_bytes,
)
from megatron_ep_v2.errors import ClosedError, InputError, SettingsError, UnavailableError
from megatron_ep_v2.probe import load_class
from megatron_ep_v2.settings import Settings

logger = logging.getLogger("megatron_ep_v2")

# For transfers of redundant experts, what deep_ep 2.5.0 takes on H200. It asks nvidia-smi for the speed of NVLink, and
# without an answer it comes to 0 SMs, with which its call fails.
_TRANSFER_SMS = 10


class EPBuffer(Starter, ElasticBuffer):
    """An expert-parallel buffer on DeepEP's `EPBuffer`; `contract.DeferringBuffer` documents the calls, `ElasticBuffer`
    the arguments."""

    carrier = CARRIERS["ep"]
    defers = keeps_topk_idx = True

    def __init__(self, group: ProcessGroup, spec: BufferSpec, settings: Settings, hosts: list[str]):
        if spec.redundancy is not None and settings.deterministic:
            # deep_ep 2.5.0, impls/ep/reduce_grads.cuh: chunks are added with atomics, in the order in which they come.
            raise SettingsError(
                "DeepEP adds the gradients of redundant experts in no fixed order",
                found=f"deterministic={settings.describe()['deterministic']}, redundant_experts on",
                needed="one of the two",
                fix="unset MCORE_DEEPEP_V2_REDUNDANT_EXPERTS, or leave MCORE_DEEPEP_V2_DETERMINISTIC and "
                "--deterministic-mode off",
            )
        self._region: torch.Tensor | None = None  # [bytes] uint8, of deep_ep's memory that peers write to
        super().__init__(group, spec, settings, hosts)
        self._slots: Slots | None = None
        if self._region is not None:
            self._slots = carve(self._redundancy(), self._region)
            self.num_bytes += self._region.numel()
            self._transfer_sms: int = self._buffer.lb_get_theoretical_num_sms() or _TRANSFER_SMS
            in_reach = getattr(self._buffer, "num_nvlink_ranks", group.size())
            if in_reach != group.size():
                raise UnavailableError(
                    "redundant experts move over NVLink, and not all ranks of this group are in one NVLink domain",
                    found=f"{in_reach} of {group.size()} ranks",
                    needed="an expert-parallel group inside one NVLink domain",
                    fix="unset MCORE_DEEPEP_V2_REDUNDANT_EXPERTS, or choose another --expert-model-parallel-size",
                )

    def _redundancy_options(self, hosts: list[str]) -> dict[str, Any]:
        redundancy = self.spec.redundancy
        if redundancy is None:
            return {}
        check_one_host(hosts)
        for shape in redundancy.shapes:
            size = torch.Size(shape).numel() * redundancy.dtype.itemsize
            if size % ALIGNMENT:  # deep_ep 2.5.0: csrc/buffers/ep.hpp, lb_prefetch_weights
                raise InputError(
                    "DeepEP does not move experts of this size",
                    found=f"{size} bytes in a weight {shape} of {redundancy.dtype}",
                    needed=f"a multiple of {ALIGNMENT}",
                    fix="change --moe-ffn-hidden-size, or unset MCORE_DEEPEP_V2_REDUNDANT_EXPERTS",
                )
        memory = load_class(self.carrier.name, "BufferAllocator")()
        with torch.inference_mode(False):  # see `carve`
            self._region = memory.allocate((slot_bytes(redundancy),), torch.uint8)  # real once the buffer is built
        return {"lb_allocation_plan_or_num_bytes": memory}

    def start_dispatch(self, x: Payload, **arguments: Any) -> Pending[Dispatched]:
        """See `contract.DeferringBuffer.start_dispatch`. Raises as `dispatch`.

        deep_ep records its stream on the inputs, so that their memory is not reused while it reads them; with
        EP_AVOID_RECORD_STREAM=1 its event keeps them until the call is finished.
        """
        event = self.dispatch(x, **arguments, async_with_compute_stream=True, defer_epilogue=True)
        return self._start(lambda: (*memory_left_as_it_is(event.current_stream_wait)(), event))

    def start_combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        *,
        num_sms: int = 0,
    ) -> Pending[Combined]:
        """See `contract.DeferringBuffer.start_combine`. Raises as `combine`. Inputs as in `start_dispatch`."""
        event: Any = self.combine(
            x, handle, topk_weights, num_sms=num_sms, async_with_compute_stream=True, defer_epilogue=True
        )
        return self._start(lambda: (*memory_left_as_it_is(event.current_stream_wait)(), event))

    def _check_ready(self) -> None:
        super()._check_ready()
        self._finish_started()

    def slots(self) -> Slots:
        """See `contract.RedundantBuffer.slots`."""
        self._check_ready()
        self._redundancy()
        assert self._slots is not None
        return self._slots

    def prefetch_weights(self, slots: Slots, weights: Sequence[torch.Tensor], mapping: torch.Tensor) -> Transfer:
        """See `contract.RedundantBuffer.prefetch_weights`. Raises InputError and ClosedError before any kernel runs."""
        own, redundancy = self.slots(), self._redundancy()
        check_group_open(self.group)
        check_prefetch(self.group, redundancy, own, slots, weights, mapping)
        call = memory_left_as_it_is(self._buffer.lb_prefetch_weights)
        moved = list(slots.weights), [w.detach() for w in weights], self._on_device(mapping)
        return _Event(call(*moved, num_sms=self._transfer_sms))

    def reduce_grads(self, slot_grads: torch.Tensor, grads: torch.Tensor, mapping: torch.Tensor) -> Transfer:
        """See `contract.RedundantBuffer.reduce_grads`. Raises as `prefetch_weights`."""
        own, redundancy = self.slots(), self._redundancy()
        check_group_open(self.group)
        check_reduce(self.group, redundancy, own, slot_grads, grads, mapping)
        if slot_grads.dtype != torch.float32:
            raise InputError(
                f"rank {self.group.rank()}: DeepEP adds gradients in fp32 only",
                found=str(slot_grads.dtype),
                needed="weights in bf16 or fp32",
                fix="train in bf16 (--bf16)",
            )
        call = memory_left_as_it_is(self._buffer.lb_reduce_grads)
        moved = slot_grads.flatten(1), grads.view(len(grads), -1), self._on_device(mapping)
        return _Event(call(*moved, num_sms=self._transfer_sms))

    def destroy(self) -> None:
        """See `ElasticBuffer.destroy`. The slots are gone with it, and the rows of a call that was not waited for."""
        started, self._started = self._started, None
        if started is not None:
            started.give_up(
                ClosedError(
                    f"this {self.carrier.label} was destroyed before a call that it had started was waited for",
                    fix="finish forward and backward before destroy_buffers()",
                )
            )
        self._slots = self._region = None
        super().destroy()

    def _redundancy(self) -> Redundancy:
        if self.spec.redundancy is None:
            raise InputError(
                "this EPBuffer was built without replica slots",
                needed="BufferSpec.redundancy",
                fix="build it with them: set MCORE_DEEPEP_V2_REDUNDANT_EXPERTS before the first dispatch",
            )
        return self.spec.redundancy

    def _on_device(self, mapping: torch.Tensor) -> torch.Tensor:
        """The mapping for the kernels; the driver stages it, so that the host does not wait."""
        return mapping.to(self.slots().weights[0].device, non_blocking=True)

    def _service_level(self, settings: Settings) -> int | None:
        """2.5 takes None for its own variables (EP_DEFAULT_RDMA_SL) and NCCL's; a value would override them."""
        return settings.sl_idx if settings.source("sl_idx") != "default" else None

    def _round_sms(self, num_sms: int) -> int:
        """2.5 rounds an odd count up, and its handle then has the even one."""
        if num_sms % 2:
            logger.info("num_sms=%d is rounded up to %d: DeepEP 2.5 takes an even number", num_sms, num_sms + 1)
        return num_sms + num_sms % 2


class _Event:
    """A transfer on deep_ep's stream. See `contract.Transfer`."""

    def __init__(self, event: Any):
        self._event = event

    def wait(self) -> None:
        """Let the current stream wait; a second call changes nothing."""
        self._event.current_stream_wait()
