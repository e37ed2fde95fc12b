"""The suite that every buffer must pass: the reference on CPU, deep_ep's own on GPUs.

Subclass `BufferConformance`, say how a buffer is made, what it runs on and what it carries. All calls on one batch in
one layout are made once, in the ranks, and leave a `Trace`; the tests look at the traces.

No test depends on the order of received rows, or of the rows of one expert: deep_ep does not fix it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from megatron_ep_v2.buffers.contract import BufferSpec
from tests.helpers import dispatch_oracle as oracle
from tests.helpers.cases import Batch, Case, Layout, edge_cases, make_batches
from tests.helpers.compare import assert_sums, check_compact, check_expanded, check_handle, same_bits
from tests.helpers.exercise import Delivery, Trace, exercise_all, returned_rows, returned_weights
from tests.helpers.harness import RanksError, run_ranks

LAYOUTS = [
    Layout(do_expand=False),
    Layout(do_expand=False, alignment=16),
    Layout(do_expand=True),
    Layout(do_expand=True, alignment=16),
    Layout(do_expand=True, alignment=16, zero=True),
    Layout(do_expand=True, alignment=128, zero=True),
]


class BufferConformance:
    """Subclass it as Test...; see the module's docstring.

    Attributes:
        factory: Top-level function (group, spec) -> buffer.
        backend, device: gloo and cpu, or nccl and cuda.
        payload: The dtype that the batches about routing carry.
        payloads: Every dtype that the buffer carries.
        sizes: Group sizes.
        nan_padding: Rows that deep_ep leaves uninitialised are NaN.
        repeatable: Two equal dispatches deliver in the same order.
        accepts_strided: Non-contiguous inputs are accepted.
        cached_weights: A cached dispatch carries weights too.
        share_buffers: As in `exercise_all`.
    """

    factory: ClassVar[Callable[[Any, BufferSpec], Any]]
    backend: ClassVar[str] = "gloo"
    device: ClassVar[str] = "cpu"
    payload: ClassVar[torch.dtype] = torch.float32
    payloads: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float8_e4m3fn)
    sizes: ClassVar[tuple[int, ...]] = (2, 4)
    nan_padding: ClassVar[bool] = False
    repeatable: ClassVar[bool] = True
    accepts_strided: ClassVar[bool] = False
    cached_weights: ClassVar[bool] = True
    share_buffers: ClassVar[bool] = False
    _traces: ClassVar[dict[Any, list[dict[Case, dict[Layout, Trace]]] | RanksError]] = {}

    def traces(self, case: Case, layout: Layout) -> list[Trace]:
        """Of all ranks; each batch runs once, in all its layouts, in one process group with those of its `bundle`."""
        key = (type(self), self.bundle(case))
        if key not in self._traces:
            layouts: dict[Case, list[Layout]] = {}
            for other, wanted in self.runs():
                if self.bundle(other) == self.bundle(case):
                    layouts.setdefault(other, []).append(wanted)
            args = (self.factory, self.device, layouts, self.cached_weights, self.share_buffers)
            try:
                self._traces[key] = run_ranks(case.size, exercise_all, *args, backend=self.backend)
            except RanksError as error:
                self._traces[key] = error
        found = self._traces[key]
        if isinstance(found, RanksError):
            raise found
        return [by_case[case][layout] for by_case in found]

    @classmethod
    def bundle(cls, case: Case) -> Any:
        """Batches with equal bundles share a process group: each alone, so that one that fails fails alone."""
        return case

    @classmethod
    def runs(cls) -> Iterator[tuple[Case, Layout]]:
        """Every batch and layout of this buffer."""
        for size in cls.sizes:
            edges = [replace(case, dtype=cls.payload) for case in edge_cases(size)]
            yield from itertools.product(edges, LAYOUTS)
            payloads = payload_cases(size, cls.payloads, cls.accepts_strided)
            yield from itertools.product(payloads, [LAYOUTS[0], *LAYOUTS[3:5]])

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "layout" in metafunc.fixturenames:
            runs = list(self.runs())
            marks = [() if layout in (LAYOUTS[0], LAYOUTS[4]) else pytest.mark.slow for _, layout in runs]
            params = [pytest.param(*run, marks=mark, id=f"{run[0]}-{run[1]}") for run, mark in zip(runs, marks)]
            metafunc.parametrize(("case", "layout"), params)

    def test_handle_describes_the_batch(self, case: Case, layout: Layout) -> None:
        for rank, trace in enumerate(self.traces(case, layout)):
            check_handle(case, layout.alignment, layout.do_expand, rank, trace.handle, make_batches(case))

    def test_dispatch_delivers_every_selection_once(self, case: Case, layout: Layout) -> None:
        for rank, trace in enumerate(self.traces(case, layout)):
            self.check_delivery(case, layout, rank, trace.first, trace.handle, make_batches(case), weights=True)

    def test_cached_dispatch_delivers_new_values_to_the_same_rows(self, case: Case, layout: Layout) -> None:
        values = make_batches(case, turn=1)
        for rank, trace in enumerate(self.traces(case, layout)):
            self.check_delivery(case, layout, rank, trace.cached, trace.handle, values, weights=False)
            weights = self.cached_weights
            self.check_delivery(case, layout, rank, trace.cached_weights, trace.handle, values, weights=weights)

    def test_combine_adds_up_what_comes_back(self, case: Case, layout: Layout) -> None:
        for rank, (trace, batch) in enumerate(zip(self.traces(case, layout), make_batches(case), strict=True)):
            rows = returned_rows(case, rank, layout.do_expand)
            sum_up = oracle.combined_expanded if layout.do_expand else oracle.combined_compact
            sums = sum_up(rows, batch.topk_idx, case.local_experts)
            for combined in (trace.combined, trace.combined_with_weights, trace.combined_again):
                assert combined[0].dtype == rows.dtype
                assert_sums(combined[0], sums, case.topk)

    def test_combine_carries_the_weight_of_each_selection(self, case: Case, layout: Layout) -> None:
        for rank, (trace, batch) in enumerate(zip(self.traces(case, layout), make_batches(case), strict=True)):
            wanted = returned_weights(case, rank).masked_fill(batch.topk_idx < 0, 0.0)
            assert trace.combined[1] is None
            assert same_bits(trace.combined_with_weights[1], wanted)
            assert same_bits(trace.combined_again[1], wanted)

    def test_equal_calls_give_equal_bits(self, case: Case, layout: Layout) -> None:
        for trace in self.traces(case, layout):
            assert same_bits(trace.combined[0], trace.combined_with_weights[0]), "weights must not change the sums"
            assert same_bits(trace.combined_with_weights, trace.combined_again)
            if self.repeatable:
                assert same_bits(trace.first.tensors(), trace.again.tensors())

    def test_arguments_are_left_alone(self, case: Case, layout: Layout) -> None:
        assert [trace.inputs_changed for trace in self.traces(case, layout)] == [[]] * case.size

    def check_delivery(
        self,
        case: Case,
        layout: Layout,
        rank: int,
        delivery: Delivery,
        handle: dict[str, Any],
        batch: list[Batch],
        weights: bool,
    ) -> None:
        if not layout.do_expand:
            check_compact(case, rank, delivery, handle, batch, weights)
            return
        padding = "zero" if layout.zero else "nan" if self.nan_padding else None
        check_expanded(case, layout.alignment, rank, delivery, handle, batch, weights, padding)


def payload_cases(size: int, payloads: tuple[torch.dtype, ...], strided: bool) -> Iterator[Case]:
    """One batch with dropped selections for each kind of payload, plain and, where accepted, non-contiguous."""
    tokens = (6, 0, 7, 5, 3, 8, 1, 9)[:size]
    for dtype in payloads:
        name = str(dtype).removeprefix("torch.")
        plain = Case(name, tokens, "drop some selections", experts=4 * size, topk=8, hidden=128, dtype=dtype)
        if dtype == torch.float8_e4m3fn:
            kinds = [
                replace(plain, name=f"{name}-fp32-scales", hidden=256, scales=torch.float32),
                replace(plain, name=f"{name}-ue8m0-scales", hidden=1024, scales=torch.int32),
            ]
        else:
            kinds = [plain]
        for case in kinds:
            yield case
            if strided:
                yield replace(case, name=f"{case.name}-strided", strided=True)
    if strided:
        yield Case("strided-starved-rank", tokens, "nothing to one rank", experts=4 * size, strided=True)
