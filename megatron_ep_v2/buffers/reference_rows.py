"""Rows of the reference buffer, exchanged, summed and expanded without a loop over tokens or experts."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

# By bytes per element. float8 can be neither gathered nor scattered, so rows are moved as integers.
_SAME_SIZE_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def exchange_rows(
    group: ProcessGroup,
    columns: list[torch.Tensor],
    chosen: torch.Tensor | None,
    send_counts: list[int],
    recv_counts: list[int],
) -> list[torch.Tensor]:
    """Send rows of several matrices to the ranks of a group in one message each.

    Args:
        group: Process group.
        columns: Matrices [N, ...] with a common N, of any dtypes. The list is emptied, so that temporary rows are freed
            once they are packed.
        chosen: [sum(send_counts)] int64, the row sent at each position; None = all N, in order.
        send_counts, recv_counts: Rows to and from each rank.

    Returns:
        [sum(recv_counts), ...] for each matrix, in the order of the sending ranks: views into the received message.
    """
    if len(columns) == 1 and chosen is None:
        message = columns.pop()
        # An empty view counts as contiguous whatever its strides, but cannot be viewed as bytes.
        message = message.contiguous() if len(message) else message.new_empty(message.shape)
        incoming = message.new_empty(sum(recv_counts), message.shape[1])
        _all_to_all(incoming.view(torch.uint8), message.view(torch.uint8), recv_counts, send_counts, group)
        return [incoming]

    # Each matrix and each row starts at a multiple of 8 bytes, so that every dtype can be viewed in place.
    spans, row_bytes = [], 0
    for column in columns:
        num_bytes = column.shape[1] * column.element_size()
        spans.append((slice(row_bytes, row_bytes + num_bytes), column.dtype))
        row_bytes += -(-num_bytes // 8) * 8

    outgoing = torch.empty(sum(send_counts), row_bytes, dtype=torch.uint8, device=columns[0].device)
    for span, dtype in reversed(spans):
        kind = _SAME_SIZE_INT[dtype.itemsize]
        source, target = columns.pop().contiguous().view(kind), outgoing[:, span].view(kind)
        if chosen is None:
            target.copy_(source)
        else:
            torch.index_select(source, 0, chosen, out=target)
    del source
    incoming = outgoing.new_empty(sum(recv_counts), row_bytes)
    _all_to_all(incoming, outgoing, recv_counts, send_counts, group)
    return [incoming[:, span].view(dtype) for span, dtype in spans]


def sum_rows(rows: torch.Tensor, order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sum groups of rows: group i takes the next counts[i] entries of `order`.

    embedding_bag sums in one pass, in the given order, with fp32 accumulators for 2-byte rows.

    Args:
        rows: [N, H].
        order: [M] row numbers.
        counts: [G] entries per group, adding up to M.

    Returns:
        [G, H] in the dtype of `rows`; empty groups are zero.
    """
    if len(order) == 0:
        return rows.new_zeros(len(counts), rows.shape[1])
    return F.embedding_bag(order.long(), rows.contiguous(), counts.cumsum(0) - counts, mode="sum")


def expand_rows(
    columns: list[torch.Tensor], slots: torch.Tensor, num_slots: int, *, has_weights: bool, zero: bool
) -> list[torch.Tensor]:
    """Copy received rows to the slots of their selections.

    Args:
        columns: Matrices [R, ...]; with `has_weights`, the last one is [R, K] weights.
        slots: [R, K] int64, the slot of each selection, -1 = none here.
        num_slots: P; slots without a selection are padding.
        has_weights: See `columns`.
        zero: Fill padding with zeros instead of NaN.

    Returns:
        [P, ...] for each matrix; [P] for the weights.
    """
    row, k = (slots >= 0).nonzero(as_tuple=True)
    slot = slots[row, k]
    source = torch.full((num_slots,), -1, device=slots.device)
    source[slot] = row
    spread = []
    if has_weights:
        *columns, weights = columns
        spread_weights = weights.new_full((num_slots,), 0.0 if zero else float("nan"))
        spread_weights[slot] = weights[row, k]
    for column in columns:
        bits = column.view(_SAME_SIZE_INT[column.dtype.itemsize]).index_select(0, source.clamp(min=0))
        if len(row) < num_slots:
            bits[source < 0] = 0 if zero else _nan_bits(column.dtype)
        spread.append(bits.view(column.dtype))
    return [*spread, spread_weights] if has_weights else spread


def with_garbage(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The rows [N, ...], contiguous, extended to `num_rows` (N or more) with garbage, which deep_ep leaves
    uninitialised: NaN, or row numbers for integer dtypes."""
    if len(rows) == num_rows:
        return rows.contiguous()
    longer = rows.new_empty(num_rows, *rows.shape[1:])
    longer[: len(rows)] = rows
    tail = longer[len(rows) :]
    if rows.is_floating_point():
        tail.view(_SAME_SIZE_INT[rows.dtype.itemsize]).fill_(_nan_bits(rows.dtype))
    else:
        tail.copy_(torch.arange(len(tail), device=rows.device)[:, None])
    return longer


def _nan_bits(dtype: torch.dtype) -> int:
    """NaN as an integer of the same size; all ones for packs of UE8M0, whose NaN is 0xFF."""
    if not dtype.is_floating_point:
        return -1
    return int(torch.tensor(float("nan"), dtype=dtype, device="cpu").view(_SAME_SIZE_INT[dtype.itemsize]))


def _all_to_all(
    incoming: torch.Tensor, outgoing: torch.Tensor, recv_counts: list[int], send_counts: list[int], group: ProcessGroup
) -> None:
    dist.all_to_all_single(
        incoming, outgoing, output_split_sizes=recv_counts, input_split_sizes=send_counts, group=group
    )
