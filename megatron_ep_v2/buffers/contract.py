"""The contract of an expert-parallel buffer: the calls of deep_ep 2.1.0's `ElasticBuffer` that training needs.

The wrappers of DeepEP V2's `ElasticBuffer` and `EPBuffer`, the adapter over its legacy `Buffer` and the reference on
`torch.distributed` all answer these calls, with these argument names, shapes and dtypes. The autograd functions know
nothing else.

Letters in shapes:
    T  local tokens (may differ between ranks, may be 0)          H  hidden size
    K  selections per token (top-k, including -1 = dropped)       L  local experts = num_experts / group size
    R  received rows, one per (source rank, token) with at least one selection on this rank
    P  expert-sorted rows, one per received selection, each expert's rows padded to a multiple of `expert_alignment`

Layouts:
    compact   recv_x [R, H]; recv_topk_idx [R, K] int64 LOCAL expert ids, -1 where the selection belongs to another
    rank;
              recv_topk_weights [R, K] fp32, only meaningful where recv_topk_idx >= 0
    expanded  recv_x [P, H] sorted by local expert; recv_topk_idx is None; recv_topk_weights [P] fp32.
              Padding rows are uninitialised unless `do_zero_padding` (then rows and weights are zero)

Without a host wait (`do_cpu_sync=False`, compact only) the host does not learn R: outputs have W rows instead, the most
that could arrive (group size * num_max_tokens_per_rank). R is `psum_num_recv_tokens_per_scaleup_rank[-1]`, on the
device; rows from R on are unowned: garbage in every output, ids included, which must not be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.pending import Pending

# x, or (x in float8_e4m3fn, scales [T, S] of 4 bytes per element): deep_ep's two kinds of payload.
Payload: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

MAX_TOPK = 32  # deep_ep 2.1.0: one warp lane per selection (impls/dispatch_copy_epilogue.cuh)


@dataclass(frozen=True, kw_only=True)
class Redundancy:
    """Replica slots of a rank, each with room for one expert and its gradients. Equal on every rank of the group.

    Attributes:
        num_slots: Replica slots of each rank, 1 or more.
        num_local_experts: L: experts of which each rank is the home.
        shapes: Of one expert's weight in each linear, e.g. ((2 * F, H), (H, F)).
        dtype: Of the weights. Gradients are in fp32, in fp64 for fp64 weights.
    """

    num_slots: int
    num_local_experts: int
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def grad_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class BufferSpec:
    """Sizes that a buffer is built for. Equal on every rank of the group.

    Attributes:
        num_max_tokens_per_rank: Most tokens that any rank may dispatch at once; the row stride of the wire.
        hidden: H, in elements. Buffers are sized for 2-byte elements whatever the forward payload is, because the
            backward carries gradients in bf16.
        num_topk: K.
        num_experts: Experts in the whole group; with `redundancy` the physical ones, group size * (L + replica slots).
        redundancy: Memory for copies of other ranks' experts; None = none.
    """

    num_max_tokens_per_rank: int
    hidden: int
    num_topk: int
    num_experts: int
    redundancy: Redundancy | None = None


class Handle(Protocol):
    """State of a dispatch that its combine and the two backwards need (names of deep_ep 2.1.0's EPHandle)."""

    @property
    def do_expand(self) -> bool:
        """True for the expanded layout."""

    @property
    def num_experts(self) -> int:
        """Experts in the whole group."""

    @property
    def expert_alignment(self) -> int:
        """Rows of each local expert are padded to a multiple of this."""

    @property
    def num_max_tokens_per_rank(self) -> int:
        """The capacity that the dispatch ran with."""

    @property
    def num_sms(self) -> int:
        """SMs of the dispatch. The combine and both backwards must use the same."""

    @property
    def topk_idx(self) -> torch.Tensor:
        """[T, K] int64, the selections; see `Buffer.keeps_topk_idx`."""

    @property
    def num_recv_tokens(self) -> int:
        """R; W without a host wait."""

    @property
    def num_expanded_tokens(self) -> int:
        """P; without a host wait its upper bound."""

    @property
    def num_recv_tokens_per_expert_list(self) -> list[int]:
        """L host integers, each padded to `expert_alignment`. Empty without a host wait."""

    @property
    def psum_num_recv_tokens_per_scaleup_rank(self) -> torch.Tensor:
        """int32, running sum of rows received by source rank; the last is R."""

    @property
    def psum_num_recv_tokens_per_expert(self) -> torch.Tensor:
        """[L] int32. Compact: running sum of the padded counts. Expanded: where each expert's real rows end, its first
        row being `align(psum[i - 1], expert_alignment)`."""

    @property
    def num_unaligned_recv_tokens_per_expert(self) -> torch.Tensor | None:
        """[L] int32, real rows of each local expert (expanded only)."""

    @property
    def recv_src_metadata(self) -> torch.Tensor:
        """[R, 2 + K] int32; W rows without a host wait. Column 0: source rank * num_max_tokens_per_rank + token.
        Columns 2 and on, expanded only: the row of [P, H] of selection k, or -1."""


class Buffer(Protocol):
    """An expert-parallel buffer. Every call but `get_theoretical_num_sms` and `destroy` is collective.

    Calls are in stream order: what the current stream runs before and after them need not wait for anything else.

    Attributes:
        group: The process group.
        num_max_tokens_per_rank: The capacity.
        num_bytes: Device memory that the buffer holds.
        num_sms: SMs that a call uses by default; 0 on a CPU.
        num_qps: RDMA queue pairs allocated; 0 if the buffer does not choose them.
        comm_stream: The CUDA stream that the communication's kernels run on; None = the current one.
        supports_cached_weights: Whether a dispatch with a `handle` carries `topk_weights`.
        defers: Whether it has `start_dispatch`, see `DeferringBuffer`.
        keeps_topk_idx: Whether the handle keeps the caller's `topk_idx` and not a copy. It must then not change as long
            as the handle is used: DeepEP 2.5 asserts that.
    """

    group: ProcessGroup
    num_max_tokens_per_rank: int
    num_bytes: int
    num_sms: int
    num_qps: int
    comm_stream: torch.cuda.Stream | None
    supports_cached_weights: bool
    defers: bool
    keeps_topk_idx: bool

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
    ) -> tuple[Payload, torch.Tensor | None, torch.Tensor | None, Handle, object]:
        """Send each token to every rank that holds one of its experts, once per rank.

        Args:
            x: [T, H], or ([T, H] float8_e4m3fn, [T, S] scales).
            topk_idx: [T, K] int64 global expert ids, -1 = no selection, no id twice in one token. None with `handle`.
            topk_weights: [T, K] fp32, or None.
            num_experts: Experts in the whole group; a multiple of its size. None with `handle`.
            num_max_tokens_per_rank: None = the buffer's own.
            expert_alignment: Pad each expert's rows to a multiple of this. None = 1, or the handle's.
            num_sms: 0 = the library decides. With `handle`, pass `handle.num_sms`.
            handle: Of an earlier dispatch: repeat its routing, with no exchange of counts and no host wait.
            do_cpu_sync: Wait on the host for R and P. False: W rows, see the module's docstring; such a call can be
                captured in a CUDA graph. Ignored with `handle`, whose numbers apply.
            do_expand: Return the expanded layout. With `handle`, must equal `handle.do_expand`.
            do_zero_padding: Zero the padding rows (expanded only).

        Returns:
            `(recv_x, recv_topk_idx, recv_topk_weights, handle, _)`; see the module's docstring for the layouts.
            recv_x has the type of x; recv_topk_weights is None if topk_weights is. The last is deep_ep's event, which
            calls in stream order do not need.
        """

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        *,
        num_sms: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None, object]:
        """Send rows back and sum those of each token. `x` is NOT scaled by the weights.

        Args:
            x: [R, H] compact, [P, H] expanded.
            handle: Of the dispatch.
            topk_weights: [R, K] compact, [P] expanded, fp32, or None: returned per selection, not summed.
            num_sms: 0 = the handle's own.

        Returns:
            `(combined_x [T, H], combined_topk_weights [T, K] fp32 or None, _)`, the last as in `dispatch`. Weights of
            -1 selections are 0.
        """

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        """SMs that the library takes for `num_sms=0`; 0 on a CPU."""

    def destroy(self) -> None:
        """Release everything. A second call does nothing."""


# What `Buffer.dispatch` and `Buffer.combine` return.
Dispatched: TypeAlias = tuple[Payload, torch.Tensor | None, torch.Tensor | None, Handle, object]
Combined: TypeAlias = tuple[torch.Tensor, torch.Tensor | None, object]


class DeferringBuffer(Buffer, Protocol):
    """A buffer whose calls can be started without a wait on the host or the current stream (DeepEP 2.5's
    `defer_epilogue`).

    It has one started call at most: every other call of the buffer finishes it first, so that its rows are not
    overwritten, and its result is kept. The inputs must not change until it is finished.
    """

    def start_dispatch(
        self,
        x: Payload,
        *,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_experts: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        handle: Handle | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
    ) -> Pending[Dispatched]:
        """Start a dispatch: the rows travel while the host and the current stream go on. Arguments as for `dispatch`.

        Returns:
            What `wait` of it returns is what `dispatch` would have: it waits for the counts, and copies the rows on the
            stream that is current then.
        """

    def start_combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        *,
        num_sms: int = 0,
    ) -> Pending[Combined]:
        """Start a combine. Arguments as for `combine`, whose result `wait` returns: it sums the rows on the stream that
        is current then."""


@dataclass(eq=False)
class Slots:
    """The replica slots of this rank, in memory of the buffer; shared by all layers of the group.

    Attributes:
        weights: For each linear [R, *shape], R replica slots. Their content is undefined but for the slots that a
            prefetch has filled, from its wait until the next prefetch begins.
        grads: For each linear [R, *shape], fp32 (fp64 for fp64 weights). Their content is undefined after a
            `reduce_grads`, which nothing clears: a gradient replaces what is in its slot.
        holds: What its user has had fetched last, for that user to compare; None = nothing.
        pending: The prefetch that was begun and not waited for.
    """

    weights: tuple[torch.Tensor, ...]
    grads: tuple[torch.Tensor, ...]
    holds: object = None
    pending: Transfer | None = None


class Transfer(Protocol):
    """A transfer of replicas' weights or gradients that has begun."""

    def wait(self) -> None:
        """Let what the current stream runs from now on see the result. The host does not wait on a GPU."""


class RedundantBuffer(Buffer, Protocol):
    """A buffer built with `BufferSpec.redundancy`: it moves weights and gradients of redundant experts.

    `mapping` is [P, R] int32 on the CPU, for P ranks: the logical expert in each replica slot of each rank, -1 = none.
    It is equal on all ranks; no rank has an expert of its own in a slot, nor one expert in two. It is on the CPU so
    that this is checked before a kernel runs, without a wait for the device.

    Both transfers are collective, also for ranks without a replica. They begin once what the current stream has been
    given is done; nothing of what they read or write may change until they have been waited for.
    """

    def slots(self) -> Slots:
        """This rank's replica slots, the same object each time. Not collective."""

    def prefetch_weights(self, slots: Slots, weights: Sequence[torch.Tensor], mapping: torch.Tensor) -> Transfer:
        """Copy weights from the experts' homes into the replica slots of the mapping. Other slots' content is
        undefined.

        Args:
            slots: Of this buffer.
            weights: For each linear [L, *shape], contiguous, of the slots' dtype, from a multiple of 16 bytes on: this
                rank's own experts.
            mapping: [P, R] int32 on the CPU, see above.
        """

    def reduce_grads(self, slot_grads: torch.Tensor, grads: torch.Tensor, mapping: torch.Tensor) -> Transfer:
        """Add the gradients in the replica slots of the mapping to those of the experts' homes.

        Args:
            slot_grads: One of the slots' `grads`, of this buffer.
            grads: [L, *shape], contiguous, of the same dtype, from a multiple of 16 bytes on: added to in place.
            mapping: [P, R] int32 on the CPU, see above.
        """
