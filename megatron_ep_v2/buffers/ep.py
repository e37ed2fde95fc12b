"""`EPBuffer` (DeepEP 2.5, of the package deep_ep or deep_ep_v25) as a buffer of the contract: the wrapper of 2.1's
ElasticBuffer, with what 2.5 does differently.
"""

from __future__ import annotations

import logging
from typing import Any

from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.buffers.contract import Dispatched, Payload
from megatron_ep_v2.buffers.deep_ep import memory_left_as_it_is
from megatron_ep_v2.buffers.elastic import ElasticBuffer
from megatron_ep_v2.buffers.pending import Pending, Starter
from megatron_ep_v2.settings import Settings

logger = logging.getLogger("megatron_ep_v2")


class EPBuffer(Starter, ElasticBuffer):
    """An expert-parallel buffer on DeepEP's `EPBuffer`; `contract.DeferringBuffer` documents the calls, `ElasticBuffer`
    the arguments."""

    carrier = CARRIERS["ep"]
    defers = keeps_topk_idx = True

    def start_dispatch(self, x: Payload, **arguments: Any) -> Pending[Dispatched]:
        """See `contract.DeferringBuffer.start_dispatch`. Raises as `dispatch`. deep_ep's event keeps the inputs."""
        event = self.dispatch(x, **arguments, async_with_compute_stream=True, defer_epilogue=True)
        return self._start(lambda: (*memory_left_as_it_is(event.current_stream_wait)(), event))

    def _check_ready(self) -> None:
        super()._check_ready()
        self._finish_started()

    def _service_level(self, settings: Settings) -> int | None:
        """2.5 takes None for its own variables (EP_DEFAULT_RDMA_SL) and NCCL's; a value would override them."""
        return settings.sl_idx if settings.source("sl_idx") != "default" else None

    def _round_sms(self, num_sms: int) -> int:
        """2.5 rounds an odd count up, and its handle then has the even one."""
        if num_sms % 2:
            logger.info("num_sms=%d is rounded up to %d: DeepEP 2.5 takes an even number", num_sms, num_sms + 1)
        return num_sms + num_sms % 2
