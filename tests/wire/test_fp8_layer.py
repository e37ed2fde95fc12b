"""A MoE layer whose rows, gradients or both travel in 8 bits, in real groups on the reference buffer.

Quantisation happens on the wire alone and gradients pass it straight through. So the layer is exactly the dense one on
the rows that arrive, with the gradient that arrives: both are computed here by the fp64 oracle of `fp8_oracle`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import GroupMismatchError, InputError
from megatron_ep_v2.fused_a2a import fused_dispatch
from tests.helpers.cases import COMPACT, EXPANDED, PADDED, Case, Layout, make_batch, make_batches
from tests.helpers.compare import relative_errors
from tests.helpers.dense_oracle import Dense, dense_moe
from tests.helpers.fp8_oracle import arrived
from tests.helpers.fused_layer import TOLERANCE, Step, all_experts, grad_output, of_rank, train_step, weights_dtype
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.reports import Report, assert_report, attempt

LAYOUTS = [COMPACT, EXPANDED, PADDED]
Wire = tuple[str, str]  # of the rows, of the gradients
WIRES: list[Wire] = [("fp8", "bf16"), ("bf16", "fp8"), ("fp8", "fp8"), ("mxfp8", "mxfp8"), ("mxfp8", "fp8")]
CASES = [
    Case("fp8-130", (6, 4), experts=6, hidden=130),
    Case("fp8-dropped", (5, 0), "drop some selections", experts=8, hidden=100),
    Case("fp8-256", (6, 4, 7, 5), "drop some selections", experts=12, hidden=256),
    Case("fp8-bf16", (6, 0, 7, 5), "drop some selections", experts=8, hidden=384, dtype=torch.bfloat16),
]


@isolated
def train_over(group: Any, case: Case, layouts: list[Layout], wires: list[Wire]) -> dict[tuple[Layout, Wire], Step]:
    """Runs in every rank."""
    steps = {}
    for wire in wires:
        settings.activate(settings.resolve(dispatch_dtype=wire[0], grad_dispatch_dtype=wire[1]))
        for layout in layouts:
            steps[layout, wire] = train_step(case, layout, group)
        pool.destroy_buffers()
    return steps


@functools.lru_cache(maxsize=8)
def steps(case: Case) -> list[dict[tuple[Layout, Wire], Step]]:
    return run_ranks(case.size, train_over, case, LAYOUTS, [*WIRES, ("bf16", "bf16")])


@functools.lru_cache(maxsize=32)
def dense(case: Case, wire: Wire) -> Dense:
    """One process with all tokens and experts, fed with what arrives."""
    batches = make_batches(case, weights_dtype=weights_dtype(case.dtype))
    return dense_moe(
        [arrived(batch.x, wire[0]) for batch in batches],
        [batch.topk_idx for batch in batches],
        [batch.topk_weights for batch in batches],
        all_experts(case),
        [arrived(grad_output(case, rank), wire[1]) for rank in range(case.size)],
    )


@pytest.mark.slow
@pytest.mark.parametrize("wire", WIRES, ids="-".join)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layer_is_the_dense_one_on_what_arrives(case: Case, layout: Layout, wire: Wire) -> None:
    for rank, by_run in enumerate(steps(case)):
        step = by_run[layout, wire]
        assert step.grad_x.dtype == step.output.dtype == case.dtype
        expected = of_rank(dense(case, wire), case, rank)
        for name, error in relative_errors(step.tensors(), expected.tensors()).items():
            assert error <= TOLERANCE[case.dtype], f"{name}: relative L2 error {error:.3g}"


@pytest.mark.parametrize("wire", WIRES, ids="-".join)
def test_the_error_is_that_of_e4m3_and_nothing_else_changes(wire: Wire) -> None:
    """Against the layer without quantisation: rows make the forward differ, gradients the backward alone."""
    case = CASES[2]
    for by_run in steps(case):
        for layout in LAYOUTS:
            error = relative_errors(by_run[layout, wire].tensors(), by_run[layout, ("bf16", "bf16")].tensors())
            if wire[0] == "bf16":
                assert error.pop("output") == 0.0
            # e4m3 keeps all but 2.6 % of normal numbers, in L2; what depends on several of them loses more.
            assert all(0.01 < value < 0.08 for value in error.values()), error


@isolated
def receive_padding(group: Any) -> list[int]:
    """Rows of each local expert, padding included, after asserting what the padding holds."""
    case = CASES[0]
    batch = make_batch(case, group.rank())
    counts = []
    for dtype in ("fp8", "mxfp8"):
        settings.activate(settings.resolve(dispatch_dtype=dtype))
        rows, _, _, padded, handle = fused_dispatch(
            batch.x, batch.topk_idx, batch.topk_weights, case.experts, group, do_expand=True, expert_alignment=16
        )
        ends, first = handle.psum_num_recv_tokens_per_expert.tolist(), 0
        for end, num in zip(ends, padded.tolist(), strict=True):
            assert end < first + num, "no padding to look at"
            assert rows[first:end].any(dim=1).all() and rows[first:end].isfinite().all()
            assert not rows[end : first + num].any(), "zero, and not NaN"
            first += num
        counts += padded.tolist()
        pool.destroy_buffers()
    return counts


def test_padding_arrives_as_zeros() -> None:
    for counts in run_ranks(2, receive_padding):
        assert counts == [16] * 6


# --------------------------------------------------------------------------------------------------------------- errors


@isolated
def differ(group: Any, name: str) -> Report | None:
    settings.activate(settings.resolve(**{name: "fp8" if group.rank() == 1 else "mxfp8"}))
    batch = make_batch(CASES[2], group.rank())
    return attempt(lambda: fused_dispatch(batch.x, batch.topk_idx, batch.topk_weights, 12, group))


@pytest.mark.parametrize("name", ["dispatch_dtype", "grad_dispatch_dtype"])
def test_a_rank_that_differs_is_named_on_every_rank(name: str) -> None:
    for report in run_ranks(4, differ, name):
        assert_report(report, GroupMismatchError, f"{name}: rank 1 has fp8; the others have mxfp8")


@isolated
def refuse(group: Any) -> Report | None:
    settings.activate(settings.resolve(dispatch_dtype="fp8"))
    batch = make_batch(replace(CASES[0], tokens=(5, 5)), group.rank())
    fused_dispatch(batch.x, batch.topk_idx, batch.topk_weights, 6, group)
    cube = batch.x.view(5, 1, 130)
    return attempt(lambda: fused_dispatch(cube, batch.topk_idx, batch.topk_weights, 6, group))


def test_rows_that_are_no_matrix_meet_the_usual_refusal() -> None:
    for report in run_ranks(2, refuse):
        assert_report(report, InputError, "must be a matrix", "(5, 1, 130)")
