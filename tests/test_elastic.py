"""`ElasticBuffer` on a fake deep_ep: what it refuses before any kernel runs. The kernels themselves: tests/gpu."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import elastic
from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.errors import ClosedError, EPError, SettingsError, UnavailableError

SPEC = BufferSpec(num_max_tokens_per_rank=8, hidden=256, num_topk=2, num_experts=4)
GROUP = types.SimpleNamespace(size=lambda: 2, rank=lambda: 1)
HANDLE = types.SimpleNamespace(do_expand=True, num_expanded_tokens=3, topk_idx=torch.zeros(1, 2), num_sms=14)


class FakeBuffer:
    """deep_ep.ElasticBuffer, which no test here may reach."""

    num_bytes, num_allocated_qps = 0, 0

    def __init__(self, group: Any, **options: Any):
        pass

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


def calls(buffer: elastic.ElasticBuffer) -> Iterator[EPError]:
    """What each call of a layer raises."""
    rows = torch.zeros(3, 256, dtype=torch.bfloat16)
    for call in (
        lambda: buffer.dispatch(rows, topk_idx=torch.zeros(3, 2, dtype=torch.int64), num_experts=4),
        lambda: buffer.combine(rows, HANDLE),
        lambda: buffer.dispatch(rows[:1], handle=HANDLE, do_expand=True),
    ):
        with pytest.raises(EPError) as caught:
            call()
        yield caught.value


@pytest.mark.usefixtures("deterministic")
def test_torchs_fill_of_uninitialised_memory_is_refused_with_a_remedy(buffer: elastic.ElasticBuffer) -> None:
    for error in calls(buffer):
        assert isinstance(error, SettingsError) and "fill_uninitialized_memory = False" in str(error)
    torch.utils.deterministic.fill_uninitialized_memory = False
    for error in calls(buffer):  # the next check: these rows are on the CPU
        assert not isinstance(error, SettingsError)


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
