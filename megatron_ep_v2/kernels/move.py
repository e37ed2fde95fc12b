"""Copies rows to their slots and back. A row with a slot is read once and written once; no other row is read.

PyTorch, for every device. `move_triton` is equal on CUDA tensors bit by bit, except for the dot products of `spread`,
which it sums in another order.
"""

from __future__ import annotations

import torch

# float8 supports neither comparison nor selection on every device, so rows are moved as integers.
_SAME_SIZE_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows], zero where rows is -1.

    Args:
        x: [R, H] of any dtype.
        rows: [M] int32.

    Returns:
        [M, H].
    """
    bits = x.contiguous().view(_SAME_SIZE_INT[x.element_size()])
    if not len(x):
        return bits.new_zeros(len(rows), x.shape[1]).view(x.dtype)
    moved = bits.index_select(0, rows.clamp(min=0).long())
    return moved.masked_fill_((rows < 0)[:, None], 0).view(x.dtype)


def take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values.flatten()[index] in the shape of index, zero where index is -1."""
    flat = values.flatten()
    if not len(flat):
        return values.new_zeros(index.shape)
    return torch.where(index >= 0, flat[index.clamp(min=0).long()], 0)


def gather_with_weights(
    x: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor, sources: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gather(x, rows)`, and `take(weights, sources)`.

    Args:
        x: [R, H].
        weights: [R, K].
        rows: [M] int32.
        sources: [M] int32, row * K + k; -1 where the row is.

    Returns:
        [M, H] and [M].
    """
    return gather(x, rows), take(weights, sources)


def reduce_with_weights(
    y: torch.Tensor, row_weights: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `gather_with_weights`: `reduce(y, slots, None)`, and `take(row_weights, slots)`.

    Args:
        y: [M, H].
        row_weights: [M].
        slots: [R, K] int32.

    Returns:
        [R, H] and [R, K].
    """
    return reduce(y, slots, None), take(row_weights, slots)


def reduce(y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Sum over k, in order, of weights[r, k] * y[slots[r, k]], where slots is not -1; in at least fp32.

    Args:
        y: [M, H].
        slots: [R, K] int32.
        weights: [R, K] of a floating dtype; None = 1.

    Returns:
        [R, H] in y's dtype. Rows without a slot are zero.
    """
    kind = accumulator(y)
    total = torch.zeros(len(slots), y.shape[1], dtype=kind, device=y.device)
    for k in range(slots.shape[1] if len(y) else 0):
        term = y.index_select(0, slots[:, k].clamp(min=0).long()).to(kind)
        if weights is not None:
            term = term * weights[:, k, None].to(kind)
        total += torch.where((slots[:, k] >= 0)[:, None], term, 0)
    return total.to(y.dtype)


def spread(
    grad: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, sources: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a weighted `reduce`.

    Args:
        grad: [R, H], of the output.
        y: [M, H].
        rows: [M] int32.
        sources: [M] int32, row * K + k.
        weights: [R, K].

    Returns:
        Of y: [M, H], weight * grad[row], zero on padding. Of the weights: [R, K], the dot product of y's row and grad's
        row, zero without a slot.
    """
    kind = accumulator(y)
    spread_grad = gather(grad, rows).to(kind)
    grad_y = spread_grad * take(weights, sources)[:, None].to(kind)
    dots = (spread_grad * y.to(kind)).sum(dim=1)
    # One extra entry takes the dot products of padding.
    grad_weights = dots.new_zeros(weights.numel() + 1)
    grad_weights.scatter_(0, torch.where(sources >= 0, sources, weights.numel()).long(), dots)
    return grad_y.to(y.dtype), grad_weights[:-1].view(weights.shape).to(weights.dtype)


def accumulator(y: torch.Tensor) -> torch.dtype:
    """dtype in which y's elements are summed."""
    return torch.float64 if y.dtype == torch.float64 else torch.float32


def gather_columns(scales: torch.Tensor, rows: torch.Tensor, group: int, stride: int, pack: bool) -> torch.Tensor:
    """Gather scales and transpose them, for each group of rows.

    Args:
        scales: [R, S] fp32 or int32.
        rows: [M] int32; M is a multiple of `group`.
        group: Rows of one matrix of the result.
        stride: Elements between columns, at least `group`; elements past the rows are zero.
        pack: Convert fp32 powers of two to int32 packs of four exponents.

    Returns:
        [M / group, S, stride], or [M / group, ceil(S / 4), stride] int32. With M = 0, one empty group.
    """
    moved = gather(scales, rows)
    if pack:
        exponent = moved.view(torch.int32) >> 23 & 0xFF
        exponent = torch.nn.functional.pad(exponent, (0, -exponent.shape[1] % 4))
        moved = exponent.to(torch.uint8).view(torch.int32)  # little-endian, as CUDA is
    by_column = moved.new_zeros(max(1, len(rows) // max(1, group)), moved.shape[1], stride)
    if len(rows):
        by_column[:, :, :group] = moved.unflatten(0, (-1, group)).transpose(1, 2)
    return by_column
