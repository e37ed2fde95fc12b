"""`ElasticBuffer` on a fake deep_ep: what it refuses before any kernel runs. The kernels themselves: tests/gpu."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import elastic
from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.errors import ClosedError, EPError, UnavailableError

SPEC = BufferSpec(num_max_tokens_per_rank=8, hidden=256, num_topk=2, num_experts=4)
GROUP = types.SimpleNamespace(size=lambda: 2, rank=lambda: 1)
HANDLE = types.SimpleNamespace(do_expand=True, num_expanded_tokens=3, topk_idx=torch.zeros(1, 2), num_sms=14)


class FakeBuffer:
    """deep_ep.ElasticBuffer, which no test here may reach."""

    num_bytes, num_allocated_qps = 0, 0
    comm_stream = object()

    def __init__(self, group: Any, **options: Any):
        pass

    def get_comm_stream(self) -> Any:
        return self.comm_stream

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        return 14

    def dispatch(self, *_: Any, do_zero_padding: bool = False, **__: Any) -> Any:
        raise AssertionError("deep_ep was called")

    combine = dispatch


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> elastic.ElasticBuffer:
    monkeypatch.setattr(elastic, "import_deep_ep", lambda: types.SimpleNamespace(ElasticBuffer=FakeBuffer))
    monkeypatch.setattr(elastic, "check_group_open", lambda group: None)
    return elastic.ElasticBuffer(GROUP, SPEC, settings.resolve({}), ["a", "a"])


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def layer_calls(buffer: elastic.ElasticBuffer) -> list[Callable[[], Any]]:
    """Each call of a layer."""
    rows = torch.zeros(3, 256, dtype=torch.bfloat16)
    return [
        lambda: buffer.dispatch(rows, topk_idx=torch.zeros(3, 2, dtype=torch.int64), num_experts=4),
        lambda: buffer.combine(rows, HANDLE),
        lambda: buffer.dispatch(rows[:1], handle=HANDLE, do_expand=True),
    ]


def calls(buffer: elastic.ElasticBuffer) -> Iterator[EPError]:
    """What each call of a layer raises."""
    for call in layer_calls(buffer):
        with pytest.raises(EPError) as caught:
            call()
        yield caught.value


def test_the_host_wait_is_left_out_where_asked_and_where_a_handle_has_decided(
    buffer: elastic.ElasticBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(FakeBuffer, "dispatch", lambda self, x, **arguments: given.append(arguments["do_cpu_sync"]))
    monkeypatch.setattr(elastic.ElasticBuffer, "_check_rows", lambda *_: None)  # these rows are on the CPU
    rows, picks = torch.zeros(3, 256, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64)
    buffer.dispatch(rows, topk_idx=picks, num_experts=4)
    buffer.dispatch(rows, topk_idx=picks, num_experts=4, do_cpu_sync=False)
    buffer.dispatch(rows[:1], handle=HANDLE, do_expand=True)
    assert given == [True, False, None]


@pytest.mark.usefixtures("deterministic")
def test_torchs_fill_of_uninitialised_memory_is_off_inside_deep_ep(
    buffer: elastic.ElasticBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nowhere else, also if the call fails. deep_ep asserts this in each call."""
    mode = torch.utils.deterministic
    monkeypatch.setattr(buffer, "_check_rows", lambda *_: None)
    for fill in (True, False):
        mode.fill_uninitialized_memory = fill
        seen = []
        for fails in (False, True):

            def call(*_: Any, fails: bool = fails, seen: list[bool] = seen, **__: Any) -> None:
                seen.append(mode.fill_uninitialized_memory)
                if fails:
                    raise MemoryError

            monkeypatch.setattr(FakeBuffer, "dispatch", call)
            monkeypatch.setattr(FakeBuffer, "combine", call)
            for made in layer_calls(buffer):
                with pytest.raises(MemoryError) if fails else contextlib.nullcontext():
                    made()
                assert mode.fill_uninitialized_memory is fill
        assert seen == [False] * 6


def test_deep_ep_2_0_is_told_by_its_api(monkeypatch: pytest.MonkeyPatch) -> None:
    older = type("ElasticBuffer", (FakeBuffer,), {"dispatch": lambda self, x, topk_idx=None, do_expand=False: None})
    monkeypatch.setattr(elastic, "import_deep_ep", lambda: types.SimpleNamespace(ElasticBuffer=older))
    with pytest.raises(UnavailableError, match=r"deep_ep >= 2\.1\.0"):
        elastic.ElasticBuffer(GROUP, SPEC, settings.resolve({}), ["a", "a"])


def test_a_destroyed_buffer_says_so(buffer: elastic.ElasticBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "everyone_arrives", lambda *_: False)
    buffer.destroy()
    for error in calls(buffer):
        assert isinstance(error, ClosedError)


def test_the_stream_of_the_kernels_is_deep_eps(buffer: elastic.ElasticBuffer) -> None:
    assert buffer.comm_stream is FakeBuffer.comm_stream
