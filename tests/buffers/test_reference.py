"""The reference buffer: the shared suite, and what only the reference promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from tests.helpers import dispatch_oracle as oracle
from tests.helpers.cases import Case, Layout, edge_cases, make_batches
from tests.helpers.compare import arrived_rows, gather, same_bits
from tests.helpers.conformance import LAYOUTS, BufferConformance
from tests.helpers.exercise import Trace, exercise
from tests.helpers.harness import run_ranks


def make_reference(group: Any, spec: BufferSpec) -> ReferenceBuffer:
    return ReferenceBuffer(group, spec)


class TestReference(BufferConformance):
    factory = staticmethod(make_reference)
    payloads = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
    nan_padding = True
    accepts_strided = True


@pytest.mark.slow
class TestReferenceOnEightRanks(BufferConformance):
    factory = staticmethod(make_reference)
    sizes = (8,)
    nan_padding = True

    @classmethod
    def runs(cls):
        cases = {case.name: case for case in edge_cases(8)}
        for name in ("random", "dropped-selections", "one-token"):
            for layout in (Layout(False), Layout(True, 16, zero=True)):
                yield cases[name], layout


CASES = {case.name: case for case in edge_cases(4)}


def run(case: Case) -> list[dict[Layout, Trace]]:
    return run_ranks(case.size, exercise, make_reference, "cpu", case, LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_runs_agree_bit_for_bit(dtype: torch.dtype) -> None:
    case = replace(CASES["random-large"], dtype=dtype)
    for by_layout, by_layout_again in zip(run(case), run(case), strict=True):
        for layout, one in by_layout.items():
            other = by_layout_again[layout]
            assert same_bits(one.first.tensors(), other.first.tensors())
            assert same_bits(one.cached_weights.tensors(), other.cached_weights.tensors())
            assert same_bits(one.combined_with_weights, other.combined_with_weights)
            assert torch.equal(one.handle["recv_src_metadata"], other.handle["recv_src_metadata"])


def test_rows_are_ordered_by_expert_source_and_token() -> None:
    case, batches = CASES["random"], make_batches(CASES["random"])
    topk_idx = [batch.topk_idx for batch in batches]
    traces = [(rank, layout, trace) for rank, by_layout in enumerate(run(case)) for layout, trace in by_layout.items()]
    for rank, layout, trace in traces:
        expected = oracle.arrival(topk_idx, rank, case.experts, layout.alignment)
        assert arrived_rows(trace.handle) == sorted(expected.rows)
        if layout.do_expand:
            order = expected.expanded_order()
            real = [slot for slot, selection in enumerate(order) if selection is not None]
            sources = [selection[:2] for selection in order if selection is not None]
            assert same_bits(trace.first.x[real], gather([batch.x for batch in batches], sources))
