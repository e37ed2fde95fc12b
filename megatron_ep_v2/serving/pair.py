"""Prepare and finalize: the calls before and after the experts in a serving engine, for prefill and for decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.checks import check_dispatch, pass_on
from megatron_ep_v2.buffers.contract import Handle
from megatron_ep_v2.buffers.limits import HIDDEN_MULTIPLE
from megatron_ep_v2.errors import EPError, InputError, TokenCapacityError

MAX_DECODE_TOKENS = 512  # default of the largest bucket


def bucket_of(num_tokens: int) -> int:
    """The smallest power of two that is at least `num_tokens`, the most of any rank; 1 for 0 tokens."""
    return 1 << max(0, num_tokens - 1).bit_length()


def buckets_up_to(max_tokens: int) -> list[int]:
    """1, 2, 4, ... up to the bucket of `max_tokens`."""
    return [1 << i for i in range(bucket_of(max_tokens).bit_length())]


@dataclass(frozen=True)
class Prefill:
    """Rows for the experts, sorted by local expert.

    Attributes:
        rows: [P, H]; padding between experts is zero.
        weights: [P] fp32.
        tokens_per_expert: L host integers, padding counted.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    tokens_per_expert: list[int]


@dataclass(frozen=True)
class Decode:
    """Rows for the experts, one for each token and source rank; W is the most that the bucket allows.

    Attributes:
        rows: [W, H], unowned from `num_recv` on. A view of wider rows if the transport had to widen them.
        topk_idx: [W, K] int64, this rank's experts, -1 for all other selections and in unowned rows. Local ids, or
            global ones with `global_ids`.
        topk_weights: [W, K] fp32, only valid where topk_idx >= 0.
        num_recv: [1] int32 on the device.
    """

    rows: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    num_recv: torch.Tensor


class PrepareFinalize:
    """Dispatch and combine of one process group for inference. The constructor and each call are collective.

    Args:
        group: Process group of the experts. Call `megatron_ep_v2.destroy_buffers()` before you destroy it.
        hidden: H; if needed, rows are widened with zeros to a multiple of 256 elements for the transport.
        num_experts: Experts in the whole group.
        num_topk: K.
        max_prefill_tokens: Most tokens of a rank in `prepare_prefill`.
        max_decode_tokens: Most tokens of a rank in `prepare_decode`.
        slots: Micro-batches that may be between their prepare and their finalize at the same time.
        global_ids: Decode returns global expert ids instead of local ones.
        expert_alignment: Pad each expert's rows to a multiple of this (prefill).
        dtype: dtype of the rows.

    Raises:
        TokenCapacityError: The settings, or an existing buffer, allow fewer tokens.
        EPError: See `buffers.pool.get`.
    """

    def __init__(
        self,
        group: ProcessGroup,
        *,
        hidden: int,
        num_experts: int,
        num_topk: int,
        max_prefill_tokens: int,
        max_decode_tokens: int = MAX_DECODE_TOKENS,
        slots: int = 1,
        global_ids: bool = False,
        expert_alignment: int = 1,
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.group, self.hidden, self.num_experts, self.dtype = group, hidden, num_experts, dtype
        self.num_topk, self.expert_alignment = num_topk, expert_alignment
        self.buckets = buckets_up_to(max_decode_tokens)
        self.first_id = group.rank() * (num_experts // group.size()) if global_ids else 0
        self._widening = -hidden % HIDDEN_MULTIPLE
        self._handles: list[Handle | None] = [None] * slots
        most = max(max_prefill_tokens, self.buckets[-1])
        self.buffer = pool.get(
            group,
            hidden=hidden + self._widening,
            num_topk=num_topk,
            num_experts=num_experts,
            num_tokens=most,
            payload=str(dtype),
        )
        if self.buffer.num_max_tokens_per_rank < most:
            raise TokenCapacityError(
                f"rank {group.rank()}: the group's buffer holds {self.buffer.num_max_tokens_per_rank} tokens a rank",
                needed=f"{most}, for prefill batches of {max_prefill_tokens} and decode buckets to {self.buckets[-1]}",
                fix=f"set MCORE_DEEPEP_V2_MAX_TOKENS_PER_RANK={most} or more, or make this object first",
            )

    @torch.no_grad()
    def prepare_prefill(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, *, slot: int = 0
    ) -> Prefill:
        """Send tokens to their experts' ranks; waits on the host for the counts.

        Args:
            x: [T, H].
            topk_idx: [T, K] int64 global ids, -1 = no selection.
            topk_weights: [T, K] fp32.
            slot: Slot of this micro-batch.

        Raises:
            InputError, TokenCapacityError: This rank's input is refused: another hidden size, top-k or dtype than
                this object's, too many tokens, a slot in use. Nothing was sent.
            EPError: See `buffers.contract.Buffer.dispatch`.
        """
        try:
            self._check_free(slot)
            self._check_fit(x, topk_idx, None)
        except InputError as error:
            self._refuse([error], x, None)
        rows, _, weights, handle, _ = self.buffer.dispatch(
            self._widen(x),
            topk_idx=self._kept(topk_idx),
            topk_weights=topk_weights,
            num_experts=self.num_experts,
            expert_alignment=self.expert_alignment,
            do_expand=True,
            do_zero_padding=self.expert_alignment > 1,
        )
        assert isinstance(rows, torch.Tensor) and weights is not None  # because weights were sent
        self._handles[slot] = handle
        return Prefill(rows[:, : self.hidden], weights, list(handle.num_recv_tokens_per_expert_list))

    @torch.no_grad()
    def prepare_decode(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, *, bucket: int, slot: int = 0
    ) -> Decode:
        """Send tokens to their experts' ranks without a wait on the host; shapes depend on the bucket only.

        Args:
            x: [T, H], T <= bucket.
            topk_idx, topk_weights, slot: As for `prepare_prefill`.
            bucket: `bucket_of` the most tokens of any rank; the same on every rank.

        Raises:
            InputError: As for `prepare_prefill`; or an unknown bucket, or more tokens than it holds.
            EPError: See `buffers.contract.Buffer.dispatch`.
        """
        try:
            self._check_free(slot)
            self._check_fit(x, topk_idx, bucket)
        except InputError as error:
            self._refuse([error], x, bucket)
        rows, ids, weights, handle, _ = self.buffer.dispatch(
            self._widen(x),
            topk_idx=self._kept(topk_idx),
            topk_weights=topk_weights,
            num_experts=self.num_experts,
            num_max_tokens_per_rank=bucket,
            do_cpu_sync=False,
        )
        assert isinstance(rows, torch.Tensor) and ids is not None and weights is not None  # compact layout
        self._handles[slot] = handle
        num_recv = handle.psum_num_recv_tokens_per_scaleup_rank[-1:]
        real = torch.arange(len(ids), device=ids.device)[:, None] < num_recv
        if self.first_id:
            ids = torch.where(real & (ids >= 0), ids + self.first_id, -1)
        else:
            ids = torch.where(real, ids, -1)
        return Decode(rows[:, : self.hidden], ids, weights, num_recv)

    @torch.no_grad()
    def finalize(self, rows: torch.Tensor, *, slot: int = 0) -> torch.Tensor:
        """Send the experts' rows back and sum them, unweighted.

        Args:
            rows: Prefill: [P, H], weighted. Decode: [W, H], each the weighted sum over this rank's experts; unowned
                rows are not read.
            slot: Slot of this micro-batch.

        Returns:
            [T, H].

        Raises:
            InputError: Nothing was prepared in this slot; the other ranks do not learn that, because without a handle
                there is no call of theirs to answer. Or the rows have another number, hidden size or dtype: then, and
                after a PeerError, the slot keeps its micro-batch: pass the right rows, or `abandon` it.
            EPError: See `buffers.contract.Buffer.combine`.
        """
        handle = self._handles[slot]
        if handle is None:
            raise InputError(
                f"rank {self.group.rank()}: nothing was prepared in slot {slot}",
                fix="one finalize for each prepare, with the same slot",
            )
        try:
            self._check_rows(rows, "return rows of the hidden size and dtype that prepare has delivered")
        except InputError as error:
            self.buffer.combine(rows, handle, **pass_on(self.buffer, [error]))
        combined = self.buffer.combine(self._widen(rows), handle)[0]
        self._handles[slot] = None
        return combined[:, : self.hidden]

    def abandon(self, slot: int = 0) -> None:
        """Drop the micro-batch of a slot after an error, so that the slot can be used again. Not collective, but all
        ranks must do it: a rank that does not refuses its next prepare, and the others raise with it."""
        self._handles[slot] = None

    def check_tokens(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, bucket: int | None = None
    ) -> None:
        """Check arguments as `prepare_decode` does, or without a bucket `prepare_prefill`. A refusal replaces that
        call: if the buffer can report it to the other ranks, they raise too.

        Raises:
            InputError: See `prepare_decode` and `prepare_prefill`.
        """
        try:
            self._check_fit(x, topk_idx, bucket)
            most = self.buffer.num_max_tokens_per_rank
            check_dispatch(x, topk_idx, topk_weights, self.num_experts, most, None, False, self.group)
        except InputError as error:
            self._refuse([error], x, bucket)

    def _refuse(self, refusals: list[EPError], x: torch.Tensor, bucket: int | None) -> None:
        """Raise the refusal, by a call of the dispatch in which the other ranks wait."""
        self.buffer.dispatch(
            x, num_max_tokens_per_rank=bucket, do_cpu_sync=bucket is None, **pass_on(self.buffer, refusals)
        )

    def _check_fit(self, x: torch.Tensor, topk_idx: torch.Tensor, bucket: int | None) -> None:
        self._check_rows(x, "make PrepareFinalize with hidden and dtype of the model's hidden states")
        rank, num_tokens = self.group.rank(), len(x)
        if topk_idx.dim() != 2 or topk_idx.shape[1] != self.num_topk:
            raise InputError(
                f"rank {rank}: these selections are not those that the serving pair was made for",
                found=f"topk_idx {tuple(topk_idx.shape)}",
                needed=f"[{num_tokens}, {self.num_topk}]",
                fix="make PrepareFinalize with num_topk of the model",
            )
        if bucket is not None and (bucket not in self.buckets or num_tokens > bucket):
            raise InputError(
                f"rank {rank}: {num_tokens} tokens cannot be decoded in a bucket of {bucket}",
                needed=f"a power of two up to {self.buckets[-1]} that holds the tokens of every rank",
                fix=self._better_bucket(num_tokens, bucket),
            )

    def _better_bucket(self, num_tokens: int, bucket: int) -> str:
        """The fix for a bucket that this object does not have, or that is too small for the tokens."""
        largest, enough = self.buckets[-1], bucket_of(num_tokens)
        right = f"bucket=bucket_of(most tokens of any rank), which is at least {enough} here"
        if max(bucket, num_tokens) <= largest:
            return right
        larger = f"make PrepareFinalize with max_decode_tokens of at least {max(bucket_of(bucket), enough)}"
        return larger + (", or pass so many to prepare_prefill" if enough > largest else f"; else {right}")

    def _check_rows(self, rows: torch.Tensor, fix: str) -> None:
        if rows.dim() != 2 or rows.shape[1] != self.hidden or rows.dtype != self.dtype:
            raise InputError(
                f"rank {self.group.rank()}: these rows are not those that the serving pair was made for",
                found=f"{rows.dtype} {tuple(rows.shape)}",
                needed=f"{self.dtype} [rows, {self.hidden}]",
                fix=fix,
            )

    def _kept(self, topk_idx: torch.Tensor) -> torch.Tensor:
        """The selections as the handle may keep them: the caller may overwrite its own before `finalize`."""
        return topk_idx.clone() if self.buffer.keeps_topk_idx else topk_idx

    def _check_free(self, slot: int) -> None:
        """Check the slot before a dispatch: raising after it would leave the other ranks in half a layer."""
        if self._handles[slot] is not None:
            raise InputError(
                f"rank {self.group.rank()}: slot {slot} still holds a micro-batch that was not finalized",
                fix="finalize it first (or abandon it, after an error), or give each micro-batch a slot of its own "
                f"(slots={len(self._handles) + 1})",
            )

    def _widen(self, rows: torch.Tensor) -> torch.Tensor:
        return F.pad(rows, (0, self._widening)) if self._widening else rows.contiguous()
