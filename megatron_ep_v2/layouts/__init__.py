"""Layouts of received rows for grouped GEMMs.

    compact rows [R, H]    place_contiguous -> gather_rows -> GEMM [M, H] -> reduce_rows -> [R, H] for combine
    compact rows [R, H]    place_masked     -> gather_rows -> GEMM [L, expected_m, H] -> reduce_rows -> [R, H]
    expanded rows [P, H]   expanded_m_indices, expanded_ends or m_splits: the rows are not copied

docs/layouts.md shows each with the calls around it.
"""

from megatron_ep_v2.layouts.expanded import expanded_ends, expanded_m_indices, m_splits
from megatron_ep_v2.layouts.payload import gather_payload, tma_aligned
from megatron_ep_v2.layouts.places import (
    CONTIGUOUS_ALIGNMENT,
    Places,
    check_overflow,
    place_contiguous,
    place_masked,
    rows_that_fit,
    tally,
)
from megatron_ep_v2.layouts.rows import gather_rows, gather_weights, gather_with_weights, reduce_rows

__all__ = [
    "CONTIGUOUS_ALIGNMENT",
    "Places",
    "check_overflow",
    "expanded_ends",
    "expanded_m_indices",
    "gather_payload",
    "gather_rows",
    "gather_weights",
    "gather_with_weights",
    "m_splits",
    "place_contiguous",
    "place_masked",
    "reduce_rows",
    "rows_that_fit",
    "tally",
    "tma_aligned",
]
