"""Slots, assigned and used one selection at a time in plain Python and fp64: what `megatron_ep_v2.layouts` must agree
with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NAN = float("nan")


@dataclass
class Routing:
    """topk_idx [R, K] local ids; rows from num_recv on are garbage, here too."""

    topk_idx: torch.Tensor
    num_recv: int
    num_experts: int


def routing(kind: str, rows: int = 37, topk: int = 5, num_experts: int = 6, seed: int = 0) -> Routing:
    """`random`: some selections are local; `one`: all rows select one expert alone; `sparse`: most experts stay empty;
    `all`: every row selects K experts; `nothing`: no row was received; `no rows`: there is no room for one either."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "no rows":
        return Routing(torch.zeros(0, topk, dtype=torch.int64), 0, num_experts)
    topk_idx = torch.rand(rows, num_experts + topk, generator=generator).topk(topk, dim=1).indices
    topk_idx[topk_idx >= num_experts] = -1
    if kind == "one":
        topk_idx.fill_(-1)
        topk_idx[:, 2] = 3
    elif kind == "sparse":
        topk_idx[(topk_idx != 1) & (topk_idx != num_experts - 1)] = -1
    elif kind == "all":
        topk_idx = torch.rand(rows, num_experts, generator=generator).topk(topk, dim=1).indices
    num_recv = 0 if kind == "nothing" else rows - 9
    topk_idx[num_recv:] = torch.randint(-(2**62), 2**62, topk_idx[num_recv:].shape, generator=generator)
    topk_idx[num_recv + 1 :, 0] = 0  # ids that look real
    return Routing(topk_idx, num_recv, num_experts)


KINDS = ["random", "one", "sparse", "all", "nothing", "no rows"]


@dataclass
class Slots:
    """As `Places` has them."""

    slots: list[list[int]]
    rows: list[int]
    m_indices: list[int]
    counts: list[int]
    ends: list[int]
    overflow: int
    needed: int


def contiguous(r: Routing, num_rows: int, alignment: int) -> Slots:
    totals = count(r)
    start, starts, ends = 0, [], []
    for total in totals:
        starts.append(min(start, num_rows))
        start += -(-total // alignment) * alignment
        ends.append(min(start, num_rows))
    return fill(r, starts, ends, num_rows, start)


def masked(r: Routing, expected_m: int) -> Slots:
    starts = [e * expected_m for e in range(r.num_experts)]
    ends = [start + expected_m for start in starts]
    return fill(r, starts, ends, r.num_experts * expected_m, max(count(r)))


def count(r: Routing) -> list[int]:
    return [int((r.topk_idx[: r.num_recv] == e).sum()) for e in range(r.num_experts)]


def fill(r: Routing, starts: list[int], ends: list[int], num_rows: int, needed: int) -> Slots:
    slots = [[-1] * r.topk_idx.shape[1] for _ in r.topk_idx]
    rows, m_indices, counts, overflow = [-1] * num_rows, [-1] * num_rows, [0] * r.num_experts, 0
    for row in range(r.num_recv):
        for k, expert in enumerate(r.topk_idx[row].tolist()):
            if expert < 0:
                continue
            slot = starts[expert] + counts[expert]
            if slot >= ends[expert]:
                overflow += 1
                continue
            slots[row][k], rows[slot], m_indices[slot] = slot, row, expert
            counts[expert] += 1
    return Slots(slots, rows, m_indices, counts, ends, overflow, needed)


def gathered(x: torch.Tensor, layout: Slots) -> torch.Tensor:
    """[M, H] fp64, zero on padding."""
    out = torch.zeros(len(layout.rows), x.shape[1], dtype=torch.float64)
    for slot, row in enumerate(layout.rows):
        if row >= 0:
            out[slot] = x[row].double()
    return out


def reduced(y: torch.Tensor, layout: Slots, weights: torch.Tensor | None = None) -> torch.Tensor:
    """[R, H] fp64."""
    out = torch.zeros(len(layout.slots), y.shape[1], dtype=torch.float64)
    for row, slots in enumerate(layout.slots):
        for k, slot in enumerate(slots):
            if slot >= 0:
                out[row] += y[slot].double() * (1.0 if weights is None else weights[row, k].double())
    return out
