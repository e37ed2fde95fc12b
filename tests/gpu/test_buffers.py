"""The shared suite on deep_ep's own buffers: the V2 carrier in both layouts, the legacy Buffer in the compact one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.buffers.limits import HIDDEN_MULTIPLE
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.probe import probe
from tests.helpers.carriers import buffer_class, v2_carrier
from tests.helpers.cases import Case, Layout, edge_cases
from tests.helpers.conformance import BufferConformance, payload_cases

HIDDEN = 2 * HIDDEN_MULTIPLE


@dataclass(frozen=True)
class GpuCase(Case):
    """A batch at one capacity: each new capacity compiles every kernel again."""

    @property
    def capacity(self) -> int:
        return 128


def on_gpu(case: Case, **changes: Any) -> GpuCase:
    return GpuCase(**{**vars(case), **changes})


def make_buffer(name: str, group: Any, spec: BufferSpec) -> Any:
    torch.distributed.barrier(group, device_ids=[torch.cuda.current_device()])  # makes the communicator
    return buffer_class(name)(group, spec, settings.resolve(), [socket.gethostname()] * group.size())


def make_v2(group: Any, spec: BufferSpec) -> Any:
    return make_buffer(v2_carrier(), group, spec)


def make_legacy(group: Any, spec: BufferSpec) -> Any:
    return make_buffer("legacy", group, spec)


@pytest.fixture(scope="module")
def legacy() -> None:
    if "legacy" not in probe().carriers:
        pytest.skip(f"needs {CARRIERS['legacy'].requirement}; {probe().describe()}")


class GpuConformance(BufferConformance):
    backend = "nccl"
    device = "cuda"
    payload = torch.bfloat16
    share_buffers = True
    repeatable = False  # neither buffer fixes the order of received rows
    layouts: ClassVar[tuple[Layout, ...]]

    @classmethod
    def bundle(cls, case: Case) -> int:
        """All batches of a size: a process group on NCCL takes seconds to start."""
        return case.size

    @classmethod
    def runs(cls) -> Iterator[tuple[Case, Layout]]:
        for size in cls.sizes:  # largest first: smaller groups use the processes that are there
            if size > gpu_ranks():
                continue
            for case in edge_cases(size):
                # Few shapes, because each compiles its own kernels: see conftest.py. One other, on the largest group.
                large, largest = case.name == "random-large", size == gpu_ranks()
                changes = {} if large else {"topk": 4, "experts": 4 * size}
                if (case.topk == 3 or (large and largest)) and case.name != "top-8":
                    for layout in cls.layouts:
                        yield on_gpu(case, dtype=torch.bfloat16, hidden=HIDDEN, **changes), layout
            for case in cls.more_payloads(size):
                for layout in cls.layouts:
                    hidden = HIDDEN if case.scales == torch.float32 else case.hidden
                    yield on_gpu(case, hidden=hidden, topk=4), layout

    @classmethod
    def more_payloads(cls, size: int) -> Iterator[Case]:
        yield from ()


class TestV2Buffer(GpuConformance):
    factory = staticmethod(make_v2)
    sizes = (8, 4, 2)
    layouts = (Layout(False), Layout(True), Layout(True, 128, zero=True))

    @classmethod
    def more_payloads(cls, size: int) -> Iterator[Case]:
        if size == gpu_ranks():
            yield from payload_cases(size, (torch.float8_e4m3fn,), False)


@pytest.mark.usefixtures("legacy")
class TestLegacyBuffer(GpuConformance):
    factory = staticmethod(make_legacy)
    sizes = (8, 4, 2)
    layouts = (Layout(False),)
    cached_weights = False


def test_the_suite_runs_on_every_group_size_here() -> None:
    sizes = {case.size for case, _ in TestV2Buffer.runs()}
    assert sizes == {size for size in (2, 4, 8) if size <= gpu_ranks()}
