"""`LegacyBuffer` on a fake deep_ep: what it refuses before any kernel runs, and how it reports deep_ep's failures."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import legacy
from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.errors import InputError, SettingsError, UnavailableError

SPEC = BufferSpec(num_max_tokens_per_rank=8, hidden=256, num_topk=2, num_experts=4)
GROUP = types.SimpleNamespace(size=lambda: 2, rank=lambda: 0)


class FakeBuffer:
    """deep_ep.Buffer as far as it gets without a GPU."""

    sms = 0
    comm_stream = object()

    def get_comm_stream(self) -> Any:
        return self.comm_stream

    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int, explicitly_destroy: bool = False):
        raise RuntimeError("peer access is not supported between these two devices")

    @classmethod
    def set_num_sms(cls, num_sms: int) -> None:
        cls.sms = num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        return types.SimpleNamespace(
            get_nvl_buffer_size_hint=lambda *_: 1024,
            get_rdma_buffer_size_hint=lambda *_: 0,
        )

    get_combine_config = get_dispatch_config


@pytest.fixture(autouse=True)
def fake_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy, "load_class", lambda name: FakeBuffer)
    monkeypatch.setattr(FakeBuffer, "sms", 0)


def test_an_odd_number_of_sms_is_refused_before_deep_ep_asserts() -> None:
    with pytest.raises(SettingsError) as caught:
        legacy.LegacyBuffer(GROUP, SPEC, settings.resolve({"MCORE_DEEPEP_V2_NUM_SMS": "15"}), ["a", "a"])
    assert "num_sms=15 from MCORE_DEEPEP_V2_NUM_SMS" in str(caught.value) and "even" in str(caught.value)
    assert FakeBuffer.sms == 0, "deep_ep was asked all the same"


def test_a_failed_construction_keeps_deep_eps_own_words() -> None:
    with pytest.raises(UnavailableError) as caught:
        legacy.LegacyBuffer(GROUP, SPEC, settings.resolve({}), ["a", "a"])
    assert "peer access is not supported" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert FakeBuffer.sms == legacy.DEFAULT_NUM_SMS


def test_a_dispatch_without_a_host_wait_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBuffer, "__init__", lambda self, *_, **__: None)
    monkeypatch.setattr(legacy, "check_group_open", lambda group: None)
    buffer = legacy.LegacyBuffer(GROUP, SPEC, settings.resolve({}), ["a", "a"])
    assert buffer.comm_stream is FakeBuffer.comm_stream
    rows, topk_idx = torch.zeros(3, 256, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(InputError, match="cannot dispatch without a host wait") as caught:
        buffer.dispatch(rows, topk_idx=topk_idx, num_experts=4, do_cpu_sync=False)
    assert caught.value.fix and "buffer=ep, buffer=elastic, buffer=reference" in caught.value.fix
    with pytest.raises(InputError, match="no expanded layout") as caught:
        buffer.dispatch(rows, topk_idx=topk_idx, num_experts=4, do_expand=True)
    assert caught.value.fix and "buffer=ep, buffer=elastic, buffer=reference" in caught.value.fix
