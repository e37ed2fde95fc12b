"""`deep_ep.ElasticBuffer` (DeepEP 2.1) as a buffer of the contract, with checks and a teardown that cannot hang.

Calls are passed through unchanged: the contract is ElasticBuffer's own interface. `ep.py` has what 2.5 does otherwise.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers import gin
from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.buffers.checks import check_combine, check_dispatch, check_group_open
from megatron_ep_v2.buffers.contract import BufferSpec, Handle, Payload
from megatron_ep_v2.buffers.deep_ep import everyone_arrives, memory_left_as_it_is
from megatron_ep_v2.buffers.limits import check_limits, check_rows, check_selections
from megatron_ep_v2.buffers.redundancy import refuse
from megatron_ep_v2.errors import ClosedError, SettingsError, UnavailableError
from megatron_ep_v2.generations import GENERATIONS
from megatron_ep_v2.probe import load_class
from megatron_ep_v2.settings import Settings, environment

logger = logging.getLogger("megatron_ep_v2")


class ElasticBuffer:
    """An expert-parallel buffer on `deep_ep.ElasticBuffer`; `contract.Buffer` documents the calls.

    Sized for bf16 with the model's top-k, whatever the forward payload is: the backward carries gradients in bf16.

    Args:
        group: NCCL process group whose communicator exists (a collective ran on it).
        spec: What the buffer is built for; equal on every rank.
        settings: The settings in force.
        hosts: Host name of each rank of the group.

    Raises:
        InputError: A size that the kernels do not carry.
        UnavailableError: The group needs RDMA that is not there, or deep_ep could not build the buffer.
    """

    carrier = CARRIERS["elastic"]
    supports_cached_weights = True
    defers = False
    keeps_topk_idx = False

    def __init__(self, group: ProcessGroup, spec: BufferSpec, settings: Settings, hosts: list[str]):
        generation = GENERATIONS[str(self.carrier.generation)]
        self._max_local_experts = generation.max_local_experts
        check_limits(group, spec, self._max_local_experts)
        self.group, self.spec = group, spec
        self.num_max_tokens_per_rank = spec.num_max_tokens_per_rank
        kind = load_class(self.carrier.name)
        more = self._redundancy_options(hosts)
        disable_gin, self.gin_reason = gin.choose(settings, gin.rdma_vendors(), hosts, generation)
        logger.info("EP_DISABLE_GIN=%d for this buffer: %s", disable_gin, self.gin_reason)
        try:
            with environment(EP_DISABLE_GIN=str(int(disable_gin))):
                self._buffer: Any = kind(
                    group,
                    num_max_tokens_per_rank=spec.num_max_tokens_per_rank,
                    hidden=spec.hidden,
                    num_topk=spec.num_topk,
                    deterministic=settings.deterministic,
                    allow_hybrid_mode=settings.allow_hybrid_mode,
                    allow_multiple_reduction=settings.allow_multiple_reduction,
                    prefer_overlap_with_compute=settings.prefer_overlap_with_compute,
                    sl_idx=self._service_level(settings),
                    num_allocated_qps=settings.num_qps,
                    num_cpu_timeout_secs=settings.num_cpu_timeout_secs,
                    num_gpu_timeout_secs=settings.num_gpu_timeout_secs,
                    explicitly_destroy=True,
                    **more,
                )
        except (RuntimeError, AssertionError) as error:
            raise UnavailableError(
                f"DeepEP could not build its {self.carrier.label} for a group of {group.size()}",
                found=f"{type(error).__name__}: {error}",
                needed="NVLink between the ranks of a host, and NCCL GIN (RDMA) between hosts",
                fix="on one host without RDMA set MCORE_DEEPEP_V2_GIN=off; else install the fabric's driver (OFED)",
            ) from error
        self.num_bytes = int(self._buffer.num_bytes)
        self.num_qps = int(self._buffer.num_allocated_qps)
        self.comm_stream: torch.cuda.Stream | None = self._buffer.get_comm_stream()
        self.num_sms = self._round_sms(settings.num_sms) or self.get_theoretical_num_sms(
            spec.num_experts, spec.num_topk
        )
        # deterministic_sort of 2.1.0 and 2.5.0: in hybrid mode between hosts it looks for the valid entries of a list.
        self._sort_waits = settings.deterministic and getattr(self._buffer, "num_scaleout_ranks", 1) > 1

    def _redundancy_options(self, hosts: list[str]) -> dict[str, Any]:
        """Options of the class that it is built with where the spec has replica slots."""
        if self.spec.redundancy is not None:
            raise refuse(self.carrier.label, "the EPBuffer of DeepEP 2.5, or the reference buffer")
        return {}

    def _service_level(self, settings: Settings) -> int | None:
        return settings.sl_idx

    def _round_sms(self, num_sms: int) -> int:
        return num_sms

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        return int(self._buffer.get_theoretical_num_sms(num_experts, num_topk))

    def dispatch(
        self,
        x: Payload,
        *,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        handle: Handle | None = None,
        do_cpu_sync: bool = True,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        **more: Any,
    ) -> Any:
        """See `contract.Buffer.dispatch`. Raises InputError, TokenCapacityError and ClosedError before any kernel
        runs.

        Args:
            **more: For deep_ep's own call, whose answer is returned.
        """
        self._check_ready()
        if handle is None:
            check_group_open(self.group)
            if not do_cpu_sync and self._sort_waits:
                raise _sort_would_wait(self.group.rank())
        capacity = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        check_dispatch(x, topk_idx, topk_weights, num_experts, capacity, handle, do_expand, self.group, do_cpu_sync)
        if isinstance(x, tuple):
            self._check_rows(x[0], torch.float8_e4m3fn)
        else:
            self._check_rows(x, torch.bfloat16)
        check_selections(self.group, self.spec, topk_idx, topk_weights, num_experts, self._max_local_experts)
        num_sms = num_sms or (self.num_sms if handle is None else handle.num_sms)
        return memory_left_as_it_is(self._buffer.dispatch)(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_experts=num_experts,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            expert_alignment=expert_alignment,
            num_sms=num_sms,
            handle=handle,
            do_cpu_sync=do_cpu_sync if handle is None else None,  # fixed by the handle
            do_expand=do_expand,
            do_zero_padding=do_zero_padding,
            **more,
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        *,
        num_sms: int = 0,
        **more: Any,
    ) -> Any:
        """See `contract.Buffer.combine`. Raises InputError and ClosedError before any kernel runs.

        Args:
            **more: As in `dispatch`.
        """
        self._check_ready()
        check_combine(x, handle, topk_weights, self.group)
        self._check_rows(x, torch.bfloat16)
        return memory_left_as_it_is(self._buffer.combine)(
            x,
            handle,
            topk_weights=topk_weights,
            num_sms=num_sms,  # 0 is the handle's own
            **more,
        )

    def destroy(self) -> None:
        """Release the buffer. deep_ep's own destroy is a barrier of kernels, so it runs only if every rank arrives. If
        one does not (it failed, or left), the memory is freed when the process ends."""
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            return
        if everyone_arrives(self.group, f"{self.carrier.label}.destroy"):
            buffer.destroy()

    def _check_ready(self) -> None:
        if self._buffer is None:
            raise ClosedError(f"this {self.carrier.label} was destroyed", fix="ask get_buffer() for a new one")

    def _check_rows(self, rows: torch.Tensor, dtype: torch.dtype) -> None:
        check_rows(self.group, self.spec, rows, dtype)


def _sort_would_wait(rank: int) -> SettingsError:
    return SettingsError(
        f"rank {rank}: deep_ep's deterministic dispatch between hosts waits on the host, and this one must not wait",
        found="deterministic=true and allow_hybrid_mode=true in a group that spans hosts, and a dispatch of sync-free "
        "mode or of a decode",
        needed="one of the two modes, or a group inside one NVLink domain",
        fix="leave MCORE_DEEPEP_V2_SYNC_FREE off, or set MCORE_DEEPEP_V2_DETERMINISTIC=off, or "
        "MCORE_DEEPEP_V2_ALLOW_HYBRID_MODE=off",
    )
