"""`EPBuffer` (DeepEP 2.5, of the package deep_ep or deep_ep_v25) as a buffer of the contract: the wrapper of 2.1's
ElasticBuffer, with what 2.5 does differently.
"""

from __future__ import annotations

import logging

from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.buffers.elastic import ElasticBuffer
from megatron_ep_v2.settings import Settings

logger = logging.getLogger("megatron_ep_v2")


class EPBuffer(ElasticBuffer):
    """An expert-parallel buffer on DeepEP's `EPBuffer`; `contract.Buffer` documents the calls, `ElasticBuffer` the
    arguments."""

    carrier = CARRIERS["ep"]
    keeps_topk_idx = True

    def _service_level(self, settings: Settings) -> int | None:
        """2.5 takes None for its own variables (EP_DEFAULT_RDMA_SL) and NCCL's; a value would override them."""
        return settings.sl_idx if settings.source("sl_idx") != "default" else None

    def _round_sms(self, num_sms: int) -> int:
        """2.5 rounds an odd count up, and its handle then has the even one."""
        if num_sms % 2:
            logger.info("num_sms=%d is rounded up to %d: DeepEP 2.5 takes an even number", num_sms, num_sms + 1)
        return num_sms + num_sms % 2
