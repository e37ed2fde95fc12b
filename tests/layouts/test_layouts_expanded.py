"""What grouped GEMMs need to know of the rows of an expanded dispatch, against the handle's own map of selections
to rows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.errors import InputError
from megatron_ep_v2.layouts import (
    expanded_ends,
    expanded_m_indices,
    gather_rows,
    gather_weights,
    m_splits,
    place_contiguous,
    reduce_rows,
)
from tests.helpers.harness import run_ranks

EXPERTS, TOPK, HIDDEN = 8, 3, 16


def batch(rank: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_idx, weights."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 0 if kind == "no tokens" else 23 + rank
    topk_idx = torch.rand(tokens, EXPERTS, generator=generator).topk(TOPK, dim=1).indices
    if kind == "one expert":
        topk_idx[:, 1:] = -1
        topk_idx[:, 0] = 5
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    return x, topk_idx, torch.rand(tokens, TOPK, generator=generator)


def faults(group: Any, kind: str, alignment: int) -> list[str]:
    """Names of what is wrong on a rank."""
    x, topk_idx, weights = batch(group.rank(), kind)
    spec = BufferSpec(num_max_tokens_per_rank=64, hidden=HIDDEN, num_topk=TOPK, num_experts=EXPERTS)
    buffer = ReferenceBuffer(group, spec)
    given: dict[str, Any] = {"topk_idx": topk_idx, "topk_weights": weights, "num_experts": EXPERTS}
    rows, _, row_weights, handle, _ = buffer.dispatch(x, expert_alignment=alignment, do_expand=True, **given)
    compact, recv_idx, recv_weights, compact_handle, _ = buffer.dispatch(x, **given)
    assert isinstance(rows, torch.Tensor) and isinstance(compact, torch.Tensor)
    assert recv_idx is not None and recv_weights is not None and row_weights is not None

    wanted = torch.full((len(rows) + 5,), -1, dtype=torch.int32)
    slots = handle.recv_src_metadata[:, 2:].long()
    wanted[slots[slots >= 0]] = recv_idx[slots >= 0].int()
    found = expanded_m_indices(handle, len(rows) + 5)  # rows that no expert holds, as a worst case brings them
    wrong = [] if found.dtype == torch.int32 and torch.equal(found, wanted) else ["m_indices"]

    splits, ends = m_splits(handle), expanded_ends(handle)
    running = list(itertools.accumulate(splits))
    if running[-1] != len(rows) or ends.dtype != torch.int32 or ends.tolist() != running:
        wrong.append("splits or ends")

    # The compact rows, laid out by us, are the rows that the dispatch laid out.
    places = place_contiguous(recv_idx, None, EXPERTS // group.size(), len(rows), alignment)
    real = places.m_indices >= 0
    if not torch.equal(places.m_indices, found[: len(rows)]) or not torch.equal(places.ends, ends):
        wrong.append("slots")
    if not torch.equal(gather_rows(compact, places)[real], rows[real]):
        wrong.append("rows")
    if not torch.equal(gather_weights(recv_weights, places)[real], row_weights[real]):
        wrong.append("weights")
    factor = (real.double() * 3 + torch.arange(len(rows)))[:, None]
    theirs, _, _ = buffer.combine(rows.nan_to_num() * factor, handle)
    ours, _, _ = buffer.combine(reduce_rows(gather_rows(compact, places) * factor, places), compact_handle)
    if not torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12):
        wrong.append("combined")
    with pytest.raises(InputError, match="not sorted by expert"):
        expanded_m_indices(compact_handle, len(compact))
    return wrong


@pytest.mark.parametrize("kind", ["random", "one expert", "no tokens"])
@pytest.mark.parametrize("alignment", [1, 16])
def test_expanded_rows(kind: str, alignment: int) -> None:
    assert run_ranks(2, faults, kind, alignment) == [[], []]
