"""What grouped GEMMs want to know about the rows of an expanded dispatch, which are sorted by expert already.

Nothing is copied and, but for `m_splits`, nothing is read on the host.
"""

from __future__ import annotations

import torch

from megatron_ep_v2.buffers.contract import Handle
from megatron_ep_v2.errors import InputError


def expanded_m_indices(handle: Handle, num_rows: int) -> torch.Tensor:
    """The local expert of each row: DeepGEMM's `m_indices`, if the dispatch had `expert_alignment=128`.

    Args:
        handle: Of an expanded dispatch.
        num_rows: P, `len(recv_x)`; more than the experts hold is padding.

    Returns:
        [P] int32, -1 on padding.
    """
    ends = expanded_ends(handle)
    place = torch.arange(num_rows, dtype=torch.int32, device=ends.device)
    # The first expert that ends behind the place; empty ones end where the one before them does.
    expert = torch.searchsorted(ends, place, right=True, out_int32=True)
    real_ends = handle.psum_num_recv_tokens_per_expert
    inside = place < real_ends[expert.clamp(max=len(ends) - 1)]
    return torch.where((expert < len(ends)) & inside, expert, -1)


def expanded_ends(handle: Handle) -> torch.Tensor:
    """[L] int32, where each expert's rows end, padding counted: `offs` of torch's grouped_mm."""
    if not handle.do_expand:
        raise InputError(
            "the rows of this handle are not sorted by expert",
            found="a handle of a compact dispatch",
            needed="a handle of a dispatch with do_expand=True",
            fix="dispatch with do_expand=True, or use place_contiguous()",
        )
    alignment = handle.expert_alignment
    return (handle.psum_num_recv_tokens_per_expert + (alignment - 1)) // alignment * alignment


def m_splits(handle: Handle) -> list[int]:
    """Rows of each local expert, padding counted: TransformerEngine's `m_splits`, from what the dispatch knows."""
    return list(handle.num_recv_tokens_per_expert_list)
