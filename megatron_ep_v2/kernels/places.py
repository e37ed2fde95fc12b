"""Assigns received selections to slots of an expert-grouped matrix with a fixed number of rows.

Stable: an expert's rows are in the order of (row, k). Nothing is read on the host, so CUDA graphs can capture it.
PyTorch, for every device; `places_triton` is equal on CUDA tensors.
"""

from __future__ import annotations

import torch

# slots [R, K], rows [M], sources [M], m_indices [M], counts [L], ends [L], overflow [], needed []: all int32.
Found = tuple[torch.Tensor, ...]


def place(
    selections: torch.Tensor, num_recv: torch.Tensor | None, num_local_experts: int, num_rows: int, alignment: int
) -> Found:
    """Lay out experts one after the other, each padded to a multiple of `alignment`. Returns the fields of
    `layouts.Places`.

    Args:
        selections: [R, K] int64 local expert ids; ids outside 0 to L - 1 are ignored.
        num_recv: int32 with one element: rows from this one on are ignored. None = all rows count.
        num_local_experts: L.
        num_rows: M.
        alignment: Divides M.
    """
    flat, valid = _flat_selections(selections, num_recv, num_local_experts)
    totals, rank = _rank(flat, num_local_experts)
    padded = (totals + alignment - 1) // alignment * alignment
    wanted = padded.cumsum(0)
    starts = (wanted - padded).clamp(max=num_rows)
    counts = torch.minimum(totals, num_rows - starts)
    return _finish(
        selections, flat, valid, rank, totals, starts, counts, wanted.clamp(max=num_rows), wanted[-1], num_rows
    )


def place_masked(
    selections: torch.Tensor, num_recv: torch.Tensor | None, num_local_experts: int, expected_m: int
) -> Found:
    """Give each expert `expected_m` rows. Arguments as for `place`."""
    flat, valid = _flat_selections(selections, num_recv, num_local_experts)
    totals, rank = _rank(flat, num_local_experts)
    starts = torch.arange(num_local_experts, device=selections.device) * expected_m
    counts = totals.clamp(max=expected_m)
    num_rows = num_local_experts * expected_m
    ends = starts + expected_m
    return _finish(selections, flat, valid, rank, totals, starts, counts, ends, totals.amax(), num_rows)


def tally(
    counts: torch.Tensor,
    needed: torch.Tensor,
    num_rows: int,
    num_padding: int,
    excess: torch.Tensor,
    most: torch.Tensor | None,
    load: torch.Tensor | None,
) -> None:
    """Add up the numbers of one layout, in place.

    Args:
        counts, needed: As `place` returned them.
        num_rows: M.
        num_padding: Rows of M that are reserved for padding between experts.
        excess: [1] int32: the largest `needed - num_rows`.
        most: [1] int32: the largest `needed - num_padding`; or None.
        load: [L] int64, to which the counts are added; or None.
    """
    torch.maximum(excess, needed - num_rows, out=excess)
    if most is not None:
        torch.maximum(most, needed - num_padding, out=most)
    if load is not None:
        load += counts


def _flat_selections(
    selections: torch.Tensor, num_recv: torch.Tensor | None, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R * K] ids, with L for ignored ones; and [R * K] bool, False for ignored ones."""
    valid = (selections >= 0) & (selections < num_local_experts)
    if num_recv is not None:
        valid &= torch.arange(len(selections), device=selections.device)[:, None] < num_recv.reshape(1, 1)
    valid = valid.flatten()
    return torch.where(valid, selections.flatten(), num_local_experts), valid


def _rank(flat: torch.Tensor, num_local_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[L] number of selections per expert, and [R * K] rank of each selection within its expert."""
    bins = torch.zeros(num_local_experts + 1, dtype=torch.int64, device=flat.device)
    bins.scatter_add_(0, flat, torch.ones_like(flat))
    order = torch.argsort(flat, stable=True)
    in_order = torch.arange(len(flat), device=flat.device) - (bins.cumsum(0) - bins)[flat[order]]
    return bins[:-1], torch.empty_like(flat).scatter_(0, order, in_order)


def _finish(
    selections: torch.Tensor,
    flat: torch.Tensor,
    valid: torch.Tensor,
    rank: torch.Tensor,
    totals: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    ends: torch.Tensor,
    needed: torch.Tensor,
    num_rows: int,
) -> Found:
    expert = flat.clamp(max=len(totals) - 1)
    placed = valid & (rank < counts[expert])
    slots = torch.where(placed, starts[expert] + rank, -1)
    # One extra row takes all selections without a slot.
    sources = torch.full((num_rows + 1,), -1, device=selections.device)
    sources.scatter_(0, torch.where(placed, slots, num_rows), torch.arange(len(flat), device=selections.device))
    m_indices = torch.full_like(sources, -1)
    m_indices.scatter_(0, torch.where(placed, slots, num_rows), flat)
    sources, m_indices = sources[:-1], m_indices[:-1]
    rows = torch.where(sources >= 0, sources // max(1, selections.shape[1]), -1)
    overflow = (totals - counts).sum()
    found = (slots.view(selections.shape), rows, sources, m_indices, counts, ends, overflow, needed)
    return tuple(tensor.to(torch.int32) for tensor in found)
