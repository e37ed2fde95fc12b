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
from tests.helpers.cases import Case, make_batch
from tests.helpers.harness import run_ranks

CASES = [
    Case("random", (23, 24), hidden=16, experts=8, dtype=torch.float64),
    Case("one expert", (23, 24), "all to one expert", hidden=16, experts=8, dtype=torch.float64),
    Case("no tokens", (0, 0), hidden=16, experts=8, dtype=torch.float64),
]


def faults(group: Any, case: Case, alignment: int) -> list[str]:
    """Names of what is wrong on a rank."""
    batch = make_batch(case, group.rank())
    spec = BufferSpec(
        num_max_tokens_per_rank=case.capacity, hidden=case.hidden, num_topk=case.topk, num_experts=case.experts
    )
    buffer = ReferenceBuffer(group, spec)
    given: dict[str, Any] = {"topk_idx": batch.topk_idx, "topk_weights": batch.topk_weights}
    given["num_experts"] = case.experts
    rows, _, row_weights, handle, _ = buffer.dispatch(batch.x, expert_alignment=alignment, do_expand=True, **given)
    compact, recv_idx, recv_weights, compact_handle, _ = buffer.dispatch(batch.x, **given)
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
    places = place_contiguous(recv_idx, None, case.local_experts, len(rows), alignment)
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


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("alignment", [1, 16])
def test_expanded_rows(case: Case, alignment: int) -> None:
    assert run_ranks(2, faults, case, alignment) == [[], []]
