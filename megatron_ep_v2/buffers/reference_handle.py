"""The handle of the reference buffer: what the ranks exchange for a batch, and what of it deep_ep's handles say."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.reference_rows import with_garbage


@dataclass(frozen=True)
class Route:
    """Rows that the ranks exchange for one batch.

    Attributes:
        number: Number of the dispatch, counted by its buffer; the same on every rank.
        send_tokens: [S] int64, the token of each row that this rank sends, by (destination rank, token).
        send_counts: Rows sent to each rank.
        recv_counts: Rows received from each rank.
    """

    number: int
    send_tokens: torch.Tensor
    send_counts: list[int]
    recv_counts: list[int]


@dataclass(frozen=True)
class ReferenceHandle:
    """`contract.Handle`, and the route and ids with which the reference repeats or reverses the routing."""

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: torch.Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    psum_num_recv_tokens_per_expert: torch.Tensor
    num_unaligned_recv_tokens_per_expert: torch.Tensor | None
    recv_src_metadata: torch.Tensor
    route: Route
    recv_topk_idx: torch.Tensor  # [R, K] int64 local expert ids, -1 elsewhere


def make_handle(
    group: ProcessGroup,
    topk_idx: torch.Tensor,
    recv_selections: torch.Tensor,
    num_experts: int,
    capacity: int,
    alignment: int,
    num_sms: int,
    do_expand: bool,
    route: Route,
) -> ReferenceHandle:
    """Assign a slot to every received selection. recv_selections: [R, 1 + K] int32, source token and global expert
    ids."""
    device = topk_idx.device
    num_local = num_experts // group.size()
    local_idx = recv_selections[:, 1:].long() - group.rank() * num_local
    is_local = (local_idx >= 0) & (local_idx < num_local)
    local_idx = torch.where(is_local, local_idx, -1)
    row, k = is_local.nonzero(as_tuple=True)
    expert = local_idx[row, k]
    counts = torch.bincount(expert, minlength=num_local)
    padded = (counts + alignment - 1) // alignment * alignment
    ends = padded.cumsum(dim=0)

    slots = torch.full_like(local_idx, -1)
    by_expert = torch.argsort(expert, stable=True)
    rank_in_expert = torch.arange(len(expert), device=device) - (counts.cumsum(0) - counts)[expert[by_expert]]
    slots[row[by_expert], k[by_expert]] = (ends - padded)[expert[by_expert]] + rank_in_expert

    recv_counts = torch.tensor(route.recv_counts, device=device)
    source_rank = torch.arange(group.size(), device=device).repeat_interleave(recv_counts)
    source = source_rank * capacity + recv_selections[:, 0]
    first_selection = is_local.int().argmax(dim=1)
    metadata = torch.stack([source, source_rank * topk_idx.shape[1] + first_selection], dim=1)
    return ReferenceHandle(
        do_expand=do_expand,
        num_experts=num_experts,
        expert_alignment=alignment,
        num_max_tokens_per_rank=capacity,
        num_sms=num_sms,
        topk_idx=topk_idx.clone(),
        num_recv_tokens=len(recv_selections),
        num_expanded_tokens=int(ends[-1]),
        num_recv_tokens_per_expert_list=padded.tolist(),
        psum_num_recv_tokens_per_scaleup_rank=recv_counts.cumsum(0).int(),
        psum_num_recv_tokens_per_expert=(ends - padded + counts if do_expand else ends).int(),
        num_unaligned_recv_tokens_per_expert=counts.int() if do_expand else None,
        recv_src_metadata=torch.cat([metadata, slots if do_expand else torch.full_like(slots, -1)], dim=1).int(),
        route=route,
        recv_topk_idx=local_idx,
    )


def forget_counts(handle: ReferenceHandle, num_ranks: int) -> ReferenceHandle:
    """The handle of a dispatch without a host wait: upper bounds instead of counts, garbage from row R on."""
    num_local = handle.num_experts // num_ranks
    most, alignment = num_ranks * handle.num_max_tokens_per_rank, handle.expert_alignment
    selections = most * min(handle.topk_idx.shape[1], num_local) + (alignment - 1) * num_local
    ids = with_garbage(handle.recv_topk_idx, most)
    ids[handle.num_recv_tokens :] %= num_local  # ids that look real
    return replace(
        handle,
        num_recv_tokens=most,
        num_expanded_tokens=-(-selections // alignment) * alignment,
        num_recv_tokens_per_expert_list=[],
        recv_src_metadata=with_garbage(handle.recv_src_metadata, most),
        recv_topk_idx=ids,
    )
