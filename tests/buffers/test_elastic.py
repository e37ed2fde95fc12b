"""The wrappers of DeepEP V2's buffers, `ElasticBuffer` (2.1) and `EPBuffer` (2.5), on a fake DeepEP: what they refuse
before any kernel runs, and what 2.5 does otherwise. The kernels themselves: tests/gpu."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import elastic, ep, gin
from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.errors import ClosedError, EPError, InputError, UnavailableError

SPEC = BufferSpec(num_max_tokens_per_rank=8, hidden=256, num_topk=2, num_experts=4)
GROUP = types.SimpleNamespace(size=lambda: 2, rank=lambda: 1)
HANDLE = types.SimpleNamespace(do_expand=True, num_expanded_tokens=3, topk_idx=torch.zeros(1, 2), num_sms=14)


class FakeBuffer:
    """DeepEP's class, whose calls no test here may reach."""

    num_bytes, num_allocated_qps = 0, 0
    comm_stream = object()

    def __init__(self, group: Any, **options: Any):
        self.options = options | {"EP_DISABLE_GIN": os.environ.get("EP_DISABLE_GIN")}

    def get_comm_stream(self) -> Any:
        return self.comm_stream

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        return 14

    def dispatch(self, *_: Any, do_zero_padding: bool = False, **__: Any) -> Any:
        raise AssertionError("deep_ep was called")

    combine = dispatch


KINDS = [elastic.ElasticBuffer, ep.EPBuffer]


def make(
    kind: type[elastic.ElasticBuffer], spec: BufferSpec = SPEC, hosts: tuple[str, str] = ("a", "a"), **given: Any
) -> Any:
    """A buffer of this kind, with these settings by name."""
    return kind(GROUP, spec, settings.resolve({}, **given), list(hosts))


@pytest.fixture(autouse=True)
def fake_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a host without RDMA devices, and without the developer's EP_DISABLE_GIN."""
    monkeypatch.setattr(elastic, "load_class", lambda name: FakeBuffer)
    monkeypatch.setattr(elastic, "check_group_open", lambda group: None)
    monkeypatch.setattr(gin, "rdma_vendors", lambda: [])
    monkeypatch.delenv("EP_DISABLE_GIN", raising=False)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def buffer(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


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


def test_a_destroyed_buffer_says_so(buffer: elastic.ElasticBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "everyone_arrives", lambda *_: False)
    buffer.destroy()
    for error in calls(buffer):
        assert isinstance(error, ClosedError)


def test_the_stream_of_the_kernels_is_deep_eps(buffer: elastic.ElasticBuffer) -> None:
    assert buffer.comm_stream is FakeBuffer.comm_stream


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_class_of_the_carrier_is_asked_for_and_its_failure_kept(
    kind: type[elastic.ElasticBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fail(self: Any, group: Any, **_: Any) -> None:
        raise RuntimeError("DevComm setup failed")

    monkeypatch.setattr(elastic, "load_class", lambda name: asked.append(name) or FakeBuffer)
    monkeypatch.setattr(FakeBuffer, "__init__", fail)
    with pytest.raises(UnavailableError, match=f"could not build its {kind.carrier.label}") as caught:
        make(kind)
    assert asked == [kind.carrier.name] and "DevComm setup failed" in str(caught.value)


# ------------------------------------------------------------------------------------------ what 2.5 does otherwise


@pytest.mark.parametrize(
    ("given", "of_2_1", "of_2_5"), [({}, 3, None), ({"sl_idx": 3}, 3, 3), ({"sl_idx": 0}, 0, 0)], ids=str
)
def test_the_service_level(given: dict[str, int], of_2_1: int, of_2_5: int | None) -> None:
    """2.5 has variables of its own for it, which a value would override."""
    assert [make(kind, **given)._buffer.options["sl_idx"] for kind in KINDS] == [of_2_1, of_2_5]


def test_an_odd_number_of_sms(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "megatron_ep_v2"):
        assert [make(kind, num_sms=15).num_sms for kind in KINDS] == [15, 16]
        assert [make(kind, num_sms=20).num_sms for kind in KINDS] == [20, 20]
        assert [make(kind).num_sms for kind in KINDS] == [14, 14], "DeepEP's own"
    rounded = [message for message in caplog.messages if "rounded" in message]
    assert rounded == ["num_sms=15 is rounded up to 16: DeepEP 2.5 takes an even number"]


@pytest.mark.parametrize(("experts", "carried_by"), [(512, 2), (514, 1), (1024, 1), (1026, 0)])
def test_the_experts_of_a_rank(experts: int, carried_by: int) -> None:
    """On 2 ranks: 2.1 carries 256 each, and its error names the generation that carries more."""
    spec = replace(SPEC, num_experts=experts)
    for kind in KINDS[2 - carried_by :]:
        make(kind, spec)
    for kind in KINDS[: 2 - carried_by]:
        with pytest.raises(InputError, match=f"{experts // 2} experts a rank") as caught:
            make(kind, spec)
        assert ("(DeepEP 2.5: 512)" in str(caught.value)) is (kind is elastic.ElasticBuffer)


def test_what_becomes_of_the_selections() -> None:
    assert [kind.keeps_topk_idx for kind in KINDS] == [False, True]


NVIDIA_AND_EFA = [gin.AMAZON, gin.MELLANOX]
# RDMA devices -> EP_DISABLE_GIN on one host and between hosts, None = refused, for 2.1 and for 2.5.
GIN: dict[str, tuple[list[str], tuple[str | None, ...], tuple[str | None, ...]]] = {
    "no device": ([], ("1", None), ("1", None)),
    "NVIDIA": ([gin.MELLANOX], ("0", "0"), ("0", "0")),
    "EFA": ([gin.AMAZON], ("0", "0"), ("1", None)),
    "both": (NVIDIA_AND_EFA, ("0", "0"), ("0", "0")),
    "another vendor": (["0x14e4"], ("0", "0"), ("1", None)),
}


@pytest.mark.parametrize("devices", GIN)
def test_gin_by_devices(devices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vendors, *expected = GIN[devices]
    monkeypatch.setattr(gin, "rdma_vendors", lambda: vendors)
    for kind, by_hosts in zip(KINDS, expected, strict=True):
        for hosts, disabled in zip((("a", "a"), ("a", "b")), by_hosts, strict=True):
            if disabled is not None:
                assert make(kind, hosts=hosts)._buffer.options["EP_DISABLE_GIN"] == disabled
                continue
            with pytest.raises(UnavailableError, match="the expert-parallel group spans 2 hosts") as caught:
                make(kind, hosts=hosts)
            assert caught.value.fix and ("stay on DeepEP 2.1 (pip install" in caught.value.fix) is bool(vendors)
            assert ("EFA" in str(caught.value.found)) is (devices == "EFA")
    assert os.environ.get("EP_DISABLE_GIN") is None, "set while a buffer is built only"


def test_gin_by_setting_and_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gin, "rdma_vendors", lambda: [gin.MELLANOX])
    for kind in KINDS:
        assert make(kind, gin="off")._buffer.options["EP_DISABLE_GIN"] == "1"
        assert "gin=off by install()" in make(kind, gin="off").gin_reason
    monkeypatch.setenv("EP_DISABLE_GIN", "1")
    for kind in KINDS:
        assert make(kind)._buffer.options["EP_DISABLE_GIN"] == "1"
        assert make(kind, gin="on")._buffer.options["EP_DISABLE_GIN"] == "0"


def test_gin_on_by_name_is_obeyed_between_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may hide the host's devices. Only devices that the generation cannot use are a reason to refuse."""
    for kind in KINDS:
        assert make(kind, hosts=("a", "b"), gin="on")._buffer.options["EP_DISABLE_GIN"] == "0"
    monkeypatch.setattr(gin, "rdma_vendors", lambda: [gin.AMAZON])
    assert make(elastic.ElasticBuffer, hosts=("a", "b"), gin="on")._buffer.options["EP_DISABLE_GIN"] == "0"
    with pytest.raises(UnavailableError, match="cannot use the RDMA devices"):
        make(ep.EPBuffer, hosts=("a", "b"), gin="on")


def test_the_vendors_of_a_hosts_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the fake one
    for name, vendor in (("mlx5_0", "0x15b3\n"), ("rdmap0", "0x1d0f\n"), ("unreadable", None)):
        (tmp_path / name / "device").mkdir(parents=True)
        if vendor:
            (tmp_path / name / "device" / "vendor").write_text(vendor)
    assert gin.rdma_vendors(tmp_path) == [gin.MELLANOX, gin.AMAZON, ""]
    assert gin.rdma_vendors(tmp_path / "none") == []


class StartingBuffer(FakeBuffer):
    """DeepEP 2.5's class: what it is asked for, and when its events are waited for."""

    log: list[str]

    def dispatch(self, x: Any, *, defer_epilogue: bool = False, **named: Any) -> Any:
        assert not defer_epilogue or (
            named["do_expand"] and named["do_cpu_sync"] is (None if named["handle"] else True)
        )
        return self._call("dispatch", defer_epilogue, (x, None, None, HANDLE), **named)

    def combine(self, x: Any, *_: Any, defer_epilogue: bool = False, **named: Any) -> Any:
        return self._call("combine", defer_epilogue, (x, None), **named)

    def _call(self, name: str, defer: bool, answer: tuple[Any, ...], **named: Any) -> Any:
        self.log.append(f"{name} starts" if defer else name)
        if not defer:
            return *answer, None
        assert named["async_with_compute_stream"]
        return types.SimpleNamespace(current_stream_wait=lambda: self.log.append(f"{name} ends") or answer)


def test_a_started_call_is_waited_for_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "load_class", lambda name: StartingBuffer)
    log: list[str] = []
    monkeypatch.setattr(StartingBuffer, "log", log, raising=False)
    monkeypatch.setattr(elastic, "check_rows", lambda *_: None)  # they would have to be on a GPU
    monkeypatch.setattr(elastic, "check_selections", lambda *_: None)
    buffer = make(ep.EPBuffer)
    x, topk_idx = torch.zeros(3, 256, dtype=torch.bfloat16), torch.tensor([[0, 1]] * 3)
    given: dict[str, Any] = {"topk_idx": topk_idx, "num_experts": 4, "do_expand": True}
    cached: dict[str, Any] = {"handle": HANDLE, "do_expand": HANDLE.do_expand}

    pending = buffer.start_dispatch(x, **given)
    assert log == ["dispatch starts"]
    assert pending.wait()[:4] == (x, None, None, HANDLE) and log == ["dispatch starts", "dispatch ends"]
    log.clear()

    started = [buffer.start_combine(x, HANDLE), buffer.start_dispatch(x, **given)]
    buffer.combine(x, HANDLE)
    assert log == ["combine starts", "combine ends", "dispatch starts", "dispatch ends", "combine"]
    assert started[0].wait()[:2] == (x, None) and started[1].wait()[3] is HANDLE and len(log) == 5
    log.clear()
    buffer.start_dispatch(x[:1], **cached)
    buffer.start_combine(x, HANDLE)
    buffer.dispatch(x[:1], **cached)
    assert log == ["dispatch starts", "dispatch ends", "combine starts", "combine ends", "dispatch"]
    assert [kind.defers for kind in KINDS] == [False, True]

    lost = buffer.start_combine(x, HANDLE)
    monkeypatch.setattr(elastic, "everyone_arrives", lambda *_: False)
    buffer.destroy()
    with pytest.raises(ClosedError, match="destroyed before"):
        lost.wait()
    assert log[5:] == ["combine starts"]
