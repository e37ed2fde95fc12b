"""Slots of received selections in an expert-grouped matrix whose number of rows the host fixes beforehand.

Letters as in `buffers.contract`, and M: the rows of that matrix. The counts stay on the device, so nothing here waits
for it, and a CUDA graph can capture all of it. Rows from `num_recv` on are unowned: their selections are ignored and
they are never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ep_v2.errors import InputError, LayoutOverflowError
from megatron_ep_v2.kernels import places as definition
from megatron_ep_v2.kernels.select import kernels_for

CONTIGUOUS_ALIGNMENT = 128  # DeepGEMM's get_mk_alignment_for_contiguous_layout(): a block of rows has one expert


@dataclass(frozen=True, kw_only=True)
class Places:
    """A slot for each local selection that fits. All tensors are int32 and on the device.

    Attributes:
        slots: [R, K], the slot of selection k of row r; -1 if the selection is not local or did not fit.
        rows: [M], the received row of each slot; -1 = padding.
        sources: [M], row * K + k of each slot; -1 = padding.
        m_indices: [M], the local expert of each slot, -1 = padding: DeepGEMM's `m_indices` (`grouped_layout`).
        counts: [L], slots in use of each expert, without padding: DeepGEMM's `masked_m`.
        ends: [L], the end of each expert's rows with padding: `offs` of torch's grouped_mm. Each expert starts at the
            end of the previous one.
        overflow: Scalar: local selections that did not fit; 0 = all fit. The caller must check it: see
            `check_overflow`.
        needed: Scalar: the number of rows (contiguous), or `expected_m` (masked), with which all would fit.
        alignment: Each expert's rows are a multiple of this; `expected_m` in the masked layout.
        expected_m: Rows of each expert; None in the contiguous layout.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    sources: torch.Tensor
    m_indices: torch.Tensor
    counts: torch.Tensor
    ends: torch.Tensor
    overflow: torch.Tensor
    needed: torch.Tensor
    alignment: int
    expected_m: int | None

    @property
    def num_rows(self) -> int:
        """M."""
        return self.rows.shape[0]

    @property
    def padded_counts(self) -> torch.Tensor:
        """[L] int32, rows of each expert with padding: `tokens_per_expert` of grouped experts."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def by_expert(self, rows: torch.Tensor) -> torch.Tensor:
        """View [M, ...] as [L, expected_m, ...] for masked GEMMs; unchanged in the contiguous layout."""
        return rows if self.expected_m is None else rows.unflatten(0, (-1, self.expected_m))


def place_contiguous(
    recv_topk_idx: torch.Tensor,
    num_recv: torch.Tensor | None,
    num_local_experts: int,
    num_rows: int,
    alignment: int = CONTIGUOUS_ALIGNMENT,
) -> Places:
    """Assign slots with experts one after the other, each padded to a multiple of `alignment`.

    Args:
        recv_topk_idx: [R, K] int64 LOCAL expert ids of a compact dispatch, -1 = the selection belongs to another rank.
        num_recv: One int32 on the device, received rows: `handle.psum_num_recv_tokens_per_scaleup_rank[-1]`. None = R.
        num_local_experts: L.
        num_rows: M, a multiple of `alignment`; `rows_that_fit` is always enough. With fewer, selections of the last
            experts may not fit, and `overflow` counts them.
        alignment: 1 = no padding.

    Raises:
        InputError: A shape, dtype or number differs from the above.
    """
    _check(recv_topk_idx, num_recv, num_local_experts)
    if alignment < 1 or num_rows < 0 or num_rows % alignment:
        raise InputError(
            "rows of a contiguous layout come in blocks",
            found=f"num_rows={num_rows}, alignment={alignment}",
            needed="num_rows a multiple of alignment, which is 1 or more",
            fix="round num_rows up; rows_that_fit() does",
        )
    finder = kernels_for(recv_topk_idx, definition, "layouts")
    found = finder.place(recv_topk_idx.contiguous(), num_recv, num_local_experts, num_rows, alignment)
    return _places(found, alignment, None)


def place_masked(
    recv_topk_idx: torch.Tensor, num_recv: torch.Tensor | None, num_local_experts: int, expected_m: int
) -> Places:
    """Assign slots with `expected_m` rows per expert: expert e owns the rows from e * expected_m on; unused ones are
    padding.

    Args:
        recv_topk_idx, num_recv, num_local_experts: As for `place_contiguous`.
        expected_m: Rows of each expert. Selections beyond it do not fit, and `overflow` counts them. R is always
            enough, because a row selects an expert at most once.

    Raises:
        InputError: A shape, dtype or number differs from the above.
    """
    _check(recv_topk_idx, num_recv, num_local_experts)
    if expected_m < 1:
        raise InputError(
            f"a masked layout cannot give {expected_m} rows to an expert",
            needed="1 or more",
            fix="pass the most rows that an expert may get; the number of received rows is always enough",
        )
    finder = kernels_for(recv_topk_idx, definition, "layouts")
    found = finder.place_masked(recv_topk_idx.contiguous(), num_recv, num_local_experts, expected_m)
    return _places(found, expected_m, expected_m)


def rows_that_fit(num_picks: int, num_local_experts: int, alignment: int = CONTIGUOUS_ALIGNMENT) -> int:
    """M of a contiguous layout in which `num_picks` local selections fit, however they are spread over the experts.

    Args:
        num_picks: Number of selections, at most R * min(K, L).
    """
    padding = min(num_local_experts, num_picks) * (alignment - 1)
    return (num_picks + padding) // alignment * alignment


def tally(
    places: Places,
    num_padding: int,
    excess: torch.Tensor,
    most: torch.Tensor | None = None,
    load: torch.Tensor | None = None,
) -> None:
    """Add up on the device what contiguous layouts leave there: one small kernel for all of it.

    Args:
        num_padding: Rows that are reserved for padding between experts.
        excess: [1] int32: the most rows that a layout lacked. Negative numbers do not count if it starts with 0.
        most: [1] int32: the most rows that a layout needed, without `num_padding`.
        load: [L] int64, to which `places.counts` are added.
    """
    finder = kernels_for(places.needed, definition, "layouts")
    finder.tally(places.counts, places.needed, places.num_rows, num_padding, excess, most, load)


def check_overflow(places: Places) -> None:
    """Wait for the device, and raise if a selection did not fit. Call it at most once a step.

    Raises:
        LayoutOverflowError: Names the size that would have been enough.
    """
    overflow, needed = torch.stack([places.overflow, places.needed]).tolist()
    if overflow:
        masked = places.expected_m is not None
        name, size = ("expected_m", places.expected_m) if masked else ("num_rows", places.num_rows)
        raise LayoutOverflowError(
            f"{overflow} received selections found no slot in the experts' layout",
            found=f"{name}={size}",
            needed=f"{name}={needed} for this routing",
            fix=f"repeat the step with {name}={needed} or more",
        )


def _check(recv_topk_idx: torch.Tensor, num_recv: torch.Tensor | None, num_local_experts: int) -> None:
    if recv_topk_idx.dim() != 2 or recv_topk_idx.dtype != torch.int64:
        raise InputError(
            "a layout cannot be made of these selections",
            found=f"{recv_topk_idx.dtype} {tuple(recv_topk_idx.shape)}",
            needed="recv_topk_idx [R, K] int64 of a compact dispatch",
            fix="dispatch with do_expand=False and pass its recv_topk_idx; an expanded dispatch has sorted its rows",
        )
    if num_recv is not None and (
        num_recv.dtype != torch.int32 or num_recv.numel() != 1 or num_recv.device != recv_topk_idx.device
    ):
        raise InputError(
            "the number of received rows has to be on the device",
            found=f"{num_recv.dtype} {tuple(num_recv.shape)} on {num_recv.device}",
            needed=f"one int32 on {recv_topk_idx.device}",
            fix="pass handle.psum_num_recv_tokens_per_scaleup_rank[-1]",
        )
    if num_local_experts < 1:
        raise InputError(
            f"a layout cannot be made for {num_local_experts} experts",
            needed="1 or more",
            fix="pass num_experts // group.size(), the experts of this rank",
        )


def _places(found: tuple[torch.Tensor, ...], alignment: int, expected_m: int | None) -> Places:
    slots, rows, sources, m_indices, counts, ends, overflow, needed = found
    return Places(
        slots=slots,
        rows=rows,
        sources=sources,
        m_indices=m_indices,
        counts=counts,
        ends=ends,
        overflow=overflow,
        needed=needed,
        alignment=alignment,
        expected_m=expected_m,
    )
