"""Group descriptions for GEMMs on the rows of an expanded dispatch, which are sorted by expert already.

No row is copied, and only `m_splits` reads counts on the host.
"""

from __future__ import annotations

import torch

from megatron_ep_v2.buffers.contract import Handle
from megatron_ep_v2.errors import InputError


def expanded_m_indices(handle: Handle, num_rows: int) -> torch.Tensor:
    """The local expert of each row: DeepGEMM's `m_indices`, if the dispatch had `expert_alignment=128`.

    Args:
        handle: Of an expanded dispatch.
        num_rows: P, `len(recv_x)`; rows past the last expert's are padding.

    Returns:
        [P] int32, -1 on padding.
    """
    ends = expanded_ends(handle)
    slot = torch.arange(num_rows, dtype=torch.int32, device=ends.device)
    # The first expert that ends after the slot; empty experts end where the previous one ends.
    expert = torch.searchsorted(ends, slot, right=True, out_int32=True)
    real_ends = handle.psum_num_recv_tokens_per_expert
    inside = slot < real_ends[expert.clamp(max=len(ends) - 1)]
    return torch.where((expert < len(ends)) & inside, expert, -1)


def expanded_ends(handle: Handle) -> torch.Tensor:
    """[L] int32, the end of each expert's rows with padding: `offs` of torch's grouped_mm."""
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
    """Rows of each local expert with padding, from the handle: TransformerEngine's `m_splits`."""
    return list(handle.num_recv_tokens_per_expert_list)
