"""Redundant experts in a buffer: weights to replica slots, gradients back. The reference in real groups; EPBuffer on a
fake DeepEP, for what is refused before any kernel runs and what reaches DeepEP."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import elastic, ep, gin, legacy
from megatron_ep_v2.buffers.contract import BufferSpec, Redundancy
from megatron_ep_v2.buffers.growing import GrowingBuffer
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.errors import (
    ClosedError,
    GroupMismatchError,
    InputError,
    PeerError,
    SettingsError,
    UnavailableError,
)
from tests.helpers.harness import run_ranks
from tests.helpers.reports import Report, assert_report, attempt

SHAPES = ((6, 4), (4, 3))
LOCAL = 2
# Of 4 ranks: an expert on two ranks, a rank with two slots in use, one with none, one that only has the second.
MAPPING = [[2, 7], [-1, -1], [-1, 2], [0, -1]]


def spec(slots: int = 2, dtype: torch.dtype = torch.float32, **more: Any) -> BufferSpec:
    redundancy = Redundancy(num_slots=slots, num_local_experts=LOCAL, shapes=SHAPES, dtype=dtype)
    return BufferSpec(num_max_tokens_per_rank=8, hidden=4, num_topk=2, num_experts=16, redundancy=redundancy, **more)


def numbers(expert: int, linear: int, kind: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's weight (kind 0), its home's gradient (1) or that of its replica on rank kind - 2, no two alike."""
    generator = torch.Generator().manual_seed(1000 * kind + 10 * expert + linear)
    return torch.randn(SHAPES[linear], generator=generator, dtype=torch.float64).to(dtype)


def own(rank: int, linear: int, kind: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([numbers(rank * LOCAL + local, linear, kind, dtype) for local in range(LOCAL)])


def moved(group: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What is in the slots at each moment, and the gradients at home, on a group of 4."""
    rank, found = group.rank(), {}
    buffer = ReferenceBuffer(group, spec(dtype=dtype))
    slots, mapping = buffer.slots(), torch.tensor(MAPPING, dtype=torch.int32)
    assert buffer.slots() is slots
    weights = [torch.nn.Parameter(own(rank, linear, 0, dtype)) for linear in range(2)]
    found["before"] = [w.clone() for w in slots.weights]
    transfer = buffer.prefetch_weights(slots, weights, mapping)
    found["begun"] = [w.clone() for w in slots.weights]
    transfer.wait()
    transfer.wait()
    found["weights"] = [w.clone() for w in slots.weights]
    found["grads"] = []
    for linear, slot_grads in enumerate(slots.grads):
        for slot, expert in enumerate(MAPPING[rank]):
            if expert >= 0:
                slot_grads[slot] = numbers(expert, linear, 2 + rank, slot_grads.dtype)
        grads = own(rank, linear, 1, slot_grads.dtype)
        transfer = buffer.reduce_grads(slot_grads, grads, mapping)
        transfer.wait()
        transfer.wait()
        found["grads"].append(grads)
        assert bool(slot_grads.isnan().all())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights_arrive_in_their_slots_and_gradients_at_home(dtype: torch.dtype) -> None:
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    for rank, found in enumerate(run_ranks(4, moved, dtype)):
        for moment in ("before", "begun"):
            assert all(bool(slots.isnan().all()) for slots in found[moment])
        for linear in range(2):
            for slot, expert in enumerate(MAPPING[rank]):
                got = found["weights"][linear][slot]
                assert got.dtype == dtype
                wanted = numbers(expert, linear, 0, dtype) if expert >= 0 else torch.full_like(got, torch.nan)
                assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))
            wanted = own(rank, linear, 1, accumulated)
            for holder, experts in enumerate(MAPPING):  # the order in which they are to be added
                for expert in experts:
                    if expert >= 0 and expert // LOCAL == rank:
                        wanted[expert % LOCAL] += numbers(expert, linear, 2 + holder, accumulated)
            assert torch.equal(found["grads"][linear], wanted)


WRONG: dict[str, Callable[[Any, list[torch.Tensor], torch.Tensor, int], Any]] = {
    "own expert": lambda b, w, m, r: b.prefetch_weights(b.slots(), w, changed(m, 0, 0, 1)),
    "twice": lambda b, w, m, r: b.prefetch_weights(b.slots(), w, changed(m, 0, 1, 2)),
    "no such expert": lambda b, w, m, r: b.reduce_grads(b.slots().grads[0], w[0], changed(m, 0, 0, 8)),
    "shape": lambda b, w, m, r: b.prefetch_weights(b.slots(), w, m[:, :1]),
    "dtype": lambda b, w, m, r: b.prefetch_weights(b.slots(), w, m.long()),
    "weights": lambda b, w, m, r: b.prefetch_weights(b.slots(), [w[1], w[0]], m),
    "one weight": lambda b, w, m, r: b.prefetch_weights(b.slots(), w[:1], m),
    "strided": lambda b, w, m, r: b.prefetch_weights(b.slots(), [w[0], w[1].mT.contiguous().mT], m),
    "unaligned weights": lambda b, w, m, r: b.prefetch_weights(b.slots(), [w[0], shifted(w[1])], m),
    "unaligned gradients": lambda b, w, m, r: b.reduce_grads(b.slots().grads[0], shifted(w[0]), m),
    "slots": lambda b, w, m, r: b.prefetch_weights(ReferenceBuffer(b.group, spec()).slots(), w, m),
    "slot of gradients": lambda b, w, m, r: b.reduce_grads(b.slots().grads[0].clone(), w[0], m),
    "gradients": lambda b, w, m, r: b.reduce_grads(b.slots().grads[0], w[1], m),
}
SAYS = {
    "own expert": ("rank 0 is to hold [1, 7]", "none of a rank's own"),
    "twice": ("rank 0 is to hold [2, 2]", "none twice on a rank"),
    "no such expert": ("rank 0 is to hold [8, 7]", "experts 0 to 7"),
    "shape": ("torch.int32 (4, 1)", "int32 (4, 2)"),
    "dtype": ("torch.int64 (4, 2)", "int32 (4, 2)"),
    "weights": ("(2, 4, 3)", "(2, 6, 4)"),
    "one weight": ("torch.float32 (2, 6, 4)", "(2, 4, 3)"),
    "strided": ("strides (12, 1, 4)", "contiguous"),
    "unaligned weights": ("(2, 4, 3) begins 4 bytes after one", "a multiple of 16 bytes"),
    "unaligned gradients": ("(2, 6, 4) begins 4 bytes after one", "a multiple of 16 bytes"),
    "slots": ("not in this buffer's memory", "slots()"),
    "slot of gradients": ("not in this buffer's memory", "slots()"),
    "gradients": ("(2, 4, 3)", "(2, 6, 4)"),
}


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same in a flat buffer, one element after its beginning."""
    flat = torch.cat([tensor.new_zeros(1), tensor.flatten()])
    return flat[1:].view(tensor.shape)


def changed(mapping: torch.Tensor, rank: int, slot: int, expert: int) -> torch.Tensor:
    mapping = mapping.clone()
    mapping[rank, slot] = expert
    return mapping


def refused(group: Any) -> dict[str, Report]:
    """Rank 1 passes each wrong argument, the others good ones to the same call; and ranks that disagree."""
    rank, found = group.rank(), {}
    buffer, mapping = ReferenceBuffer(group, spec()), torch.tensor(MAPPING, dtype=torch.int32)
    weights = [own(rank, linear, 0, torch.float32) for linear in range(2)]
    for name, call in WRONG.items():
        good = name not in ("no such expert", "slot of gradients", "gradients", "unaligned gradients")

        def right(good: bool = good) -> Any:
            if good:
                return buffer.prefetch_weights(buffer.slots(), weights, mapping)
            return buffer.reduce_grads(buffer.slots().grads[0], weights[0], mapping)

        wrong = functools.partial(call, buffer, weights, mapping, rank)
        found[name] = attempt(wrong if rank == 1 else right)
    another = changed(mapping, 1, 0, 0) if rank == 2 else mapping
    found["mapping differs"] = attempt(lambda: buffer.prefetch_weights(buffer.slots(), weights, another))
    call = buffer.reduce_grads if rank == 3 else buffer.prefetch_weights
    arguments = (buffer.slots().grads[0], weights[0]) if rank == 3 else (buffer.slots(), weights)
    found["another call"] = attempt(lambda: call(*arguments, mapping))  # type: ignore[operator]
    buffer.prefetch_weights(buffer.slots(), weights, mapping).wait()  # and it still works
    buffer.destroy()
    found["destroyed"] = attempt(lambda: buffer.prefetch_weights(buffer.slots(), weights, mapping))
    return found


def test_what_is_wrong_is_refused_on_every_rank() -> None:
    for rank, found in enumerate(run_ranks(4, refused)):
        for name, words in SAYS.items():
            if rank == 1:
                assert_report(found[name], InputError, *words)
            else:
                assert_report(found[name], PeerError, "rank 1 refused")
        assert_report(found["mapping differs"], GroupMismatchError, "mapping (checksum)", "rank 2 has")
        assert_report(found["another call"], GroupMismatchError, "rank 3 has reduce_grads")
        assert_report(found["destroyed"], ClosedError)


def grown(group: Any) -> dict[str, bool]:
    """Slots of a buffer that was replaced by a larger one still work while a handle needs it."""
    rank, mapping = group.rank(), torch.tensor([[-1], [0]], dtype=torch.int32)

    def build(made: BufferSpec) -> ReferenceBuffer:
        return ReferenceBuffer(group, replace(made, num_experts=4))

    buffer: Any = GrowingBuffer(build, replace(spec(slots=1), num_max_tokens_per_rank=2))  # type: ignore[arg-type]
    routing = {"topk_idx": torch.tensor([[0, 1]] * 2), "num_experts": 4}
    handle = buffer.dispatch(torch.zeros(2, 4), **routing)[3]
    old = buffer.slots()
    buffer.dispatch(torch.zeros(5, 4), topk_idx=torch.tensor([[0, 1]] * 5), num_experts=4)
    weights = [own(rank, linear, 0, torch.float32) for linear in range(2)]
    found = {"grown": buffer.slots() is not old and handle is not None}
    for name, slots in (("old", old), ("new", buffer.slots())):
        buffer.prefetch_weights(slots, weights, mapping).wait()
        arrived = rank == 0 or torch.equal(slots.weights[1][0], numbers(0, 1, 0, torch.float32))
        slots.grads[0].fill_(2.0)
        grads = torch.zeros(LOCAL, *SHAPES[0])
        buffer.reduce_grads(slots.grads[0], grads, mapping).wait()
        found[name] = arrived and grads.sum().item() == (48.0 if rank == 0 else 0.0)
    return found


def test_slots_of_a_buffer_that_has_grown() -> None:
    assert run_ranks(2, grown) == [{"grown": True, "old": True, "new": True}] * 2


# ------------------------------------------------------------------------------------------------------- on DeepEP 2.5

GROUP = types.SimpleNamespace(size=lambda: 2, rank=lambda: 1)
ON_TWO = torch.tensor([[2], [-1]], dtype=torch.int32)
WEIGHTS = [torch.zeros(LOCAL, *shape, dtype=torch.bfloat16) for shape in ((8, 4), (4, 4))]
SPEC = BufferSpec(
    num_max_tokens_per_rank=8,
    hidden=256,
    num_topk=2,
    num_experts=6,
    redundancy=Redundancy(num_slots=1, num_local_experts=LOCAL, shapes=((8, 4), (4, 4)), dtype=torch.bfloat16),
)


class FakeAllocator:
    """Real at once, where deep_ep's is real once the buffer is built."""

    def allocate(self, shape: tuple[int], dtype: torch.dtype) -> torch.Tensor:
        self.region = torch.zeros(shape, dtype=dtype)
        return self.region


class FakeBuffer:
    """DeepEP's class as far as these calls go."""

    num_bytes, num_allocated_qps, num_nvlink_ranks, transfer_sms = 100, 0, 2, 8

    def __init__(self, group: Any, **options: Any):
        self.options, self.calls = options, []
        self.get_comm_stream, self.get_theoretical_num_sms = object, lambda *_: 14
        self.lb_get_theoretical_num_sms, self.sms = lambda: self.transfer_sms, set()

    def lb_prefetch_weights(self, *arguments: Any, num_sms: int) -> Any:
        self.calls.append(("prefetch", arguments))
        self.sms.add(num_sms)
        return types.SimpleNamespace(current_stream_wait=lambda: self.calls.append(("waited", ())))

    def lb_reduce_grads(self, *arguments: Any, num_sms: int) -> Any:
        self.calls.append(("reduce", arguments))
        self.sms.add(num_sms)
        return types.SimpleNamespace(current_stream_wait=lambda: self.calls.append(("waited", ())))


@pytest.fixture(autouse=True)
def fake_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "load_class", lambda name: FakeBuffer)
    monkeypatch.setattr(ep, "load_class", lambda carrier, name: FakeAllocator)
    monkeypatch.setattr(legacy, "load_class", lambda name: FakeBuffer)
    monkeypatch.setattr(gin, "rdma_vendors", lambda: [])
    for module in (elastic, ep):
        monkeypatch.setattr(module, "check_group_open", lambda group: None)


def make(kind: Any, made: BufferSpec = SPEC, hosts: tuple[str, str] = ("a", "a")) -> Any:
    return kind(GROUP, made, settings.resolve({}), list(hosts))


def test_deep_ep_gets_slots_of_its_region_and_flat_gradients() -> None:
    buffer = make(ep.EPBuffer)
    calls, slots = buffer._buffer.calls, buffer.slots()
    region = buffer._buffer.options["lb_allocation_plan_or_num_bytes"].region
    inside = range(region.data_ptr(), region.data_ptr() + region.numel())
    tensors = [*slots.weights, *slots.grads]
    for tensor in tensors:
        assert tensor.data_ptr() in inside and tensor.data_ptr() + tensor.nbytes - 1 in inside
        assert (tensor.data_ptr() - region.data_ptr()) % 256 == 0 and tensor.is_contiguous()
    for n, tensor in enumerate(tensors):  # none overlaps another
        tensor.fill_(n + 1)
    assert [tensor.unique().tolist() for tensor in tensors] == [[1], [2], [3], [4]]
    assert [t.dtype for t in tensors] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert buffer.num_bytes == 100 + region.numel()
    buffer.prefetch_weights(slots, WEIGHTS, ON_TWO).wait()
    main_grad = torch.zeros(LOCAL, 4, 4)
    buffer.reduce_grads(slots.grads[1], main_grad, ON_TWO).wait()
    assert [name for name, _ in calls] == ["prefetch", "waited", "reduce", "waited"]
    _, (given_slots, given_weights, mapping) = calls[0]
    assert [t.data_ptr() for t in given_slots] == [t.data_ptr() for t in slots.weights]
    assert [t.data_ptr() for t in given_weights] == [t.data_ptr() for t in WEIGHTS]
    assert mapping.equal(ON_TWO) and mapping.dtype == torch.int32
    _, (slot_grads, grads, mapping) = calls[2]
    assert slot_grads.shape == (1, 16) and slot_grads.data_ptr() == slots.grads[1].data_ptr()
    assert grads.shape == (LOCAL, 16) and grads.data_ptr() == main_grad.data_ptr()
    assert buffer._buffer.sms == {8}


def test_a_buffer_that_an_evaluation_builds_has_slots_for_training() -> None:
    with torch.inference_mode():
        buffer = make(ep.EPBuffer)
        slots = buffer.slots()
    assert not any(tensor.is_inference() for tensor in (*slots.weights, *slots.grads))


def test_where_nvidia_smi_does_not_know_nvlink_deep_ep_gets_an_sm_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBuffer, "transfer_sms", 0)
    buffer = make(ep.EPBuffer)
    slots = buffer.slots()
    buffer.prefetch_weights(slots, WEIGHTS, ON_TWO).wait()
    buffer.reduce_grads(slots.grads[1], torch.zeros(LOCAL, 4, 4), ON_TWO).wait()
    assert buffer._buffer.sms == {10}


def test_what_deep_ep_does_not_check_is_refused_before_it_is_called() -> None:
    buffer = make(ep.EPBuffer)
    slots, grads = buffer.slots(), torch.zeros(LOCAL, 8, 4)
    for wrong, word in (
        (torch.tensor([[1], [-1]], dtype=torch.int32), "rank 0 is to hold [1]"),
        (torch.tensor([[4], [-1]], dtype=torch.int32), "rank 0 is to hold [4]"),
    ):
        assert_report(attempt(lambda wrong=wrong: buffer.prefetch_weights(slots, WEIGHTS, wrong)), InputError, word)
        assert_report(attempt(lambda wrong=wrong: buffer.reduce_grads(slots.grads[0], grads, wrong)), InputError, word)
    odd = [WEIGHTS[0], shifted(WEIGHTS[1])]
    report = attempt(lambda: buffer.prefetch_weights(slots, odd, ON_TWO))
    assert_report(report, InputError, "(2, 4, 4) begins 2 bytes after one", "flat buffer")
    report = attempt(lambda: buffer.reduce_grads(slots.grads[0], shifted(grads), ON_TWO))
    assert_report(report, InputError, "(2, 8, 4) begins 4 bytes after one")
    other = make(ep.EPBuffer).slots()
    assert_report(attempt(lambda: buffer.prefetch_weights(other, WEIGHTS, ON_TWO)), InputError, "not in this buffer's")
    assert_report(attempt(lambda: buffer.reduce_grads(other.grads[0], grads, ON_TWO)), InputError, "not in this")
    assert buffer._buffer.calls == []


def test_buffers_without_it_and_groups_over_hosts_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in ((elastic.ElasticBuffer, "ElasticBuffer"), (legacy.LegacyBuffer, "legacy Buffer")):
        assert_report(attempt(lambda kind=kind: make(kind)), SettingsError, name, "DeepEP 2.5", "REDUNDANT_EXPERTS")
        make(elastic.ElasticBuffer, replace(SPEC, redundancy=None))
    assert_report(attempt(lambda: make(ep.EPBuffer, hosts=("a", "b"))), SettingsError, "spans hosts", "2 hosts")
    monkeypatch.setattr(FakeBuffer, "num_nvlink_ranks", 1)
    assert_report(attempt(lambda: make(ep.EPBuffer)), UnavailableError, "1 of 2 ranks")
    repeats = settings.resolve({}, deterministic=True)
    report = attempt(lambda: ep.EPBuffer(GROUP, SPEC, repeats, ["a", "a"]))
    assert_report(report, SettingsError, "no fixed order", "deterministic=True (install())")
    odd = Redundancy(num_slots=1, num_local_experts=LOCAL, shapes=((3, 3),), dtype=torch.bfloat16)
    assert_report(attempt(lambda: make(ep.EPBuffer, replace(SPEC, redundancy=odd))), InputError, "18 bytes", "16")
    strict = settings.resolve({})
    assert_report(attempt(lambda: ReferenceBuffer(GROUP, SPEC, strict, ["a", "b"])), SettingsError, "spans hosts")
    plain = make(ep.EPBuffer, replace(SPEC, redundancy=None))
    assert "lb_allocation_plan_or_num_bytes" not in plain._buffer.options
    assert_report(attempt(plain.slots), InputError, "built without replica slots")
