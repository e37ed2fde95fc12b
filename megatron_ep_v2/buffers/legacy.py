"""deep_ep's legacy `Buffer` (DeepEP V1) as a buffer of the contract: compact layout only.

For installations with V1 only that use this package's checks and pool, and for comparing V1 with V2 in one job.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.buffers.checks import check_combine, check_dispatch, check_group_open
from megatron_ep_v2.buffers.contract import BufferSpec, Payload
from megatron_ep_v2.buffers.deep_ep import everyone_arrives, memory_left_as_it_is
from megatron_ep_v2.buffers.redundancy import refuse
from megatron_ep_v2.errors import ClosedError, InputError, SettingsError, UnavailableError
from megatron_ep_v2.probe import load_class
from megatron_ep_v2.settings import Settings

DEFAULT_NUM_SMS = 20  # deep_ep's own default for Buffer, and Megatron-Core's


@dataclass(frozen=True)
class LegacyHandle:
    """The fields of `contract.Handle` that a compact dispatch of V1 provides, and V1's own tuple."""

    raw: tuple[Any, ...]
    rank: int
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: torch.Tensor
    recv_topk_idx: torch.Tensor
    num_recv_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    do_expand: bool = False

    num_unaligned_recv_tokens_per_expert = None

    @property
    def num_expanded_tokens(self) -> int:
        return sum(self.num_recv_tokens_per_expert_list)

    @property
    def psum_num_recv_tokens_per_scaleup_rank(self) -> torch.Tensor:
        """On one host: column r of V1's first matrix [ranks, ranks] is the running sum of rows that rank r receives."""
        return self.raw[0][:, self.rank].contiguous()

    @property
    def psum_num_recv_tokens_per_expert(self) -> torch.Tensor:
        counts = torch.tensor(self.num_recv_tokens_per_expert_list, device=self.topk_idx.device)
        return counts.cumsum(dim=0).int()

    @property
    def recv_src_metadata(self) -> torch.Tensor:
        """On one host; built when read, for comparisons. Columns as in `contract.Handle`; column 1 and slots are -1."""
        ends = self.psum_num_recv_tokens_per_scaleup_rank
        source = torch.bucketize(torch.arange(self.num_recv_tokens, device=ends.device), ends, right=True)
        metadata = ends.new_full((self.num_recv_tokens, 2 + self.topk_idx.shape[1]), -1)
        metadata[:, 0] = source * self.num_max_tokens_per_rank + self.raw[3]
        return metadata


class LegacyBuffer:
    """An expert-parallel buffer on `deep_ep.Buffer`; `contract.Buffer` documents the calls.

    Args:
        group: NCCL process group.
        spec: What the buffer is built for; V1 sizes by hidden size alone.
        settings: The settings in force.
        hosts: Unused; V1 finds the hosts itself.

    Raises:
        SettingsError: An odd number of SMs, or replica slots.
        UnavailableError: deep_ep could not build the buffer.
    """

    supports_cached_weights = keeps_topk_idx = defers = False

    def __init__(self, group: ProcessGroup, spec: BufferSpec, settings: Settings, hosts: list[str]):
        if spec.redundancy is not None:
            raise refuse("legacy Buffer", "the EPBuffer of DeepEP 2.5, or the reference buffer")
        kind = load_class("legacy")
        self.group, self.spec = group, spec
        self.num_max_tokens_per_rank = spec.num_max_tokens_per_rank
        self.num_sms = settings.num_sms or DEFAULT_NUM_SMS
        self.num_qps = 0  # chosen by deep_ep
        if self.num_sms % 2:
            raise SettingsError(
                "deep_ep's legacy Buffer sends with one half of its SMs and receives with the other",
                found=f"num_sms={self.num_sms} from {settings.source('num_sms')}",
                needed="an even number",
                fix="set MCORE_DEEPEP_V2_NUM_SMS (or Megatron's SM count) to an even number",
            )
        kind.set_num_sms(self.num_sms)
        hidden_bytes = spec.hidden * 2
        configs = (kind.get_dispatch_config(group.size()), kind.get_combine_config(group.size()))
        num_nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size()) for config in configs)
        num_rdma_bytes = max(config.get_rdma_buffer_size_hint(hidden_bytes, group.size()) for config in configs)
        # Early V1 has no explicit destroy; its destructor then releases the buffer.
        self._explicit = "explicitly_destroy" in inspect.signature(kind).parameters
        options = {"explicitly_destroy": True} if self._explicit else {}
        try:
            self._buffer: Any = kind(group, num_nvl_bytes, num_rdma_bytes, **options)
        except (RuntimeError, AssertionError) as error:
            raise UnavailableError(
                f"deep_ep could not build a legacy Buffer for a group of {group.size()}",
                found=f"{type(error).__name__}: {error}",
                needed="NVLink between the ranks of a host; between hosts RDMA, and a deep_ep with NVSHMEM",
                fix="keep expert parallelism inside one host, or install what the message names",
            ) from error
        self.comm_stream: torch.cuda.Stream | None = self._buffer.get_comm_stream()
        self.num_bytes = num_nvl_bytes + num_rdma_bytes

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        return self.num_sms

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
        handle: LegacyHandle | None = None,
        do_cpu_sync: bool = True,
        do_expand: bool = False,
        do_zero_padding: bool = False,
    ) -> tuple[Payload, torch.Tensor | None, torch.Tensor | None, LegacyHandle, object]:
        """See `contract.Buffer.dispatch`. `num_sms` is fixed when the buffer is built.

        Raises:
            InputError: Also for what V1 lacks: the expanded layout, weights with a handle, a dispatch without a host
                wait.
        """
        self._check_open()
        capacity = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        check_dispatch(x, topk_idx, topk_weights, num_experts, capacity, handle, do_expand, self.group)
        if not do_cpu_sync and handle is None:
            raise InputError(
                f"rank {self.group.rank()}: deep_ep's legacy Buffer cannot dispatch without a host wait",
                found="do_cpu_sync=False",
                fix=f"leave MCORE_DEEPEP_V2_SYNC_FREE off, or use a buffer with it: {_with_layout('sync-free')}",
            )
        if do_expand or (handle is not None and topk_weights is not None):
            raise InputError(
                f"rank {self.group.rank()}: deep_ep's legacy Buffer has no expanded layout and no cached weights",
                fix=f"use layout=compact, or a buffer with both: {_with_layout('expanded')}",
            )
        if handle is not None:
            recv_x, _, _, _, _, event = memory_left_as_it_is(self._buffer.dispatch)(x, handle=handle.raw)
            return recv_x, handle.recv_topk_idx.clone(), None, handle, event

        assert topk_idx is not None and num_experts is not None
        get_layout = memory_left_as_it_is(self._buffer.get_dispatch_layout)
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = get_layout(topk_idx, num_experts)
        alignment = expert_alignment or 1
        recv_x, recv_idx, recv_weights, counts, raw, event = memory_left_as_it_is(self._buffer.dispatch)(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            expert_alignment=alignment,
        )
        rows = recv_x[0] if isinstance(recv_x, tuple) else recv_x
        fresh = LegacyHandle(
            raw=raw,
            rank=self.group.rank(),
            num_experts=num_experts,
            expert_alignment=alignment,
            num_max_tokens_per_rank=capacity,
            num_sms=self.num_sms,
            topk_idx=topk_idx.clone(),
            recv_topk_idx=recv_idx.clone(),
            num_recv_tokens=len(rows),
            num_recv_tokens_per_expert_list=counts,
        )
        return recv_x, recv_idx, recv_weights, fresh, event

    def combine(
        self,
        x: torch.Tensor,
        handle: LegacyHandle,
        topk_weights: torch.Tensor | None = None,
        *,
        num_sms: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None, object]:
        """See `contract.Buffer.combine`."""
        self._check_open()
        check_combine(x, handle, topk_weights, self.group)
        if topk_weights is not None:  # V1 sums a selection's weights over ranks, so other ranks must send 0
            topk_weights = topk_weights.masked_fill(handle.recv_topk_idx < 0, 0.0)
        return memory_left_as_it_is(self._buffer.combine)(x, handle.raw, topk_weights=topk_weights)

    def destroy(self) -> None:
        """Release the buffer once every rank arrives; see `ElasticBuffer.destroy`."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None and everyone_arrives(self.group, "Buffer.destroy") and self._explicit:
            buffer.destroy()

    def _check_open(self) -> None:
        if self._buffer is None:
            raise ClosedError("this legacy Buffer was destroyed", fix="ask get_buffer() for a new one")
        check_group_open(self.group)


def _with_layout(layout: str) -> str:
    return ", ".join(f"buffer={name}" for name, carrier in CARRIERS.items() if layout in carrier.layouts)
