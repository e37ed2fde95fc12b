"""`do_cpu_sync=False` on the reference buffer: the rows of an ordinary dispatch, and garbage that is not read. Where
`ElasticBuffer` needs its host wait."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import elastic
from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.errors import GroupMismatchError, InputError, SettingsError
from tests.buffers.test_elastic import GROUP, HANDLE, SPEC, FakeBuffer
from tests.helpers.cases import Case, edge_cases, make_batch
from tests.helpers.compare import same_bits
from tests.helpers.harness import run_ranks
from tests.helpers.reports import assert_report, attempt

CASES = [*edge_cases(2), *edge_cases(4), Case("fp8", (6, 0), experts=8, hidden=256, dtype=torch.float8_e4m3fn)]
CASES[-1] = replace(CASES[-1], scales=torch.float32)


def make_buffer(group: Any, case: Case) -> ReferenceBuffer:
    sizes = {"hidden": case.hidden, "num_topk": case.topk, "num_experts": case.experts}
    return ReferenceBuffer(group, BufferSpec(num_max_tokens_per_rank=case.capacity, **sizes))


def both_ways(group: Any, case: Case) -> dict[str, dict[str, Any]]:
    """All calls of a layer on one batch, with and without the host wait: what they return, by name."""
    buffer = make_buffer(group, case)
    batch, later = make_batch(case, group.rank()), make_batch(case, group.rank(), turn=1)
    found = {}
    for name, waits in (("waits", True), ("sync-free", False)):
        x, ids, weights, handle, _ = buffer.dispatch(
            batch.payload,
            topk_idx=batch.topk_idx,
            topk_weights=batch.topk_weights,
            num_experts=case.experts,
            do_cpu_sync=waits,
        )
        cached, _, cached_weights, _, _ = buffer.dispatch(
            later.payload, topk_weights=later.topk_weights, handle=handle, num_sms=handle.num_sms
        )
        real = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        rows = torch.full((len(ids), case.hidden), float("nan"), dtype=torch.bfloat16)
        rows[:real] = torch.arange(real)[:, None] % 7
        returned = torch.full((len(ids), case.topk), float("nan"))
        returned[:real] = torch.arange(real)[:, None] % 5
        combined, combined_weights, _ = buffer.combine(rows, handle, returned)
        scales = x[1] if isinstance(x, tuple) else None
        found[name] = {
            "x": x[0] if isinstance(x, tuple) else x,
            "scales": scales,
            "ids": ids,
            "weights": weights,
            "cached": cached[0] if isinstance(cached, tuple) else cached,
            "cached weights": cached_weights,
            "metadata": handle.recv_src_metadata,
            "combined": combined,
            "combined weights": combined_weights,
            "real": real,
            "numbers": (handle.num_recv_tokens, handle.num_expanded_tokens, handle.num_recv_tokens_per_expert_list),
            "counts": handle.psum_num_recv_tokens_per_expert,
        }
    return found


@functools.cache
def answers(case: Case) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(case.size, both_ways, case)


BY_ROW = ("x", "scales", "ids", "weights", "cached", "cached weights", "metadata")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_real_rows_are_those_of_an_ordinary_dispatch(case: Case) -> None:
    for found in answers(case):
        ours, theirs = found["sync-free"], found["waits"]
        assert ours["real"] == theirs["real"] == len(theirs["ids"])
        for name in BY_ROW:
            if theirs[name] is not None:
                assert len(ours[name]) == case.size * case.capacity
                assert same_bits(ours[name][: ours["real"]], theirs[name]), name
        assert same_bits(ours["combined"], theirs["combined"])
        assert same_bits(ours["combined weights"], theirs["combined weights"])
        assert not ours["combined"].isnan().any()
        assert same_bits(ours["counts"], theirs["counts"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_lies_after_them_is_poison(case: Case) -> None:
    for found in answers(case):
        ours = found["sync-free"]
        tail = {name: ours[name][ours["real"] :] for name in BY_ROW if ours[name] is not None}
        assert len(tail["ids"]), "the worst case is more than what arrives"
        for name in ("x", "weights", "cached", "cached weights"):
            assert tail[name].float().isnan().all(), name
        assert (tail["ids"] >= 0).all() and (tail["ids"] < case.local_experts).all(), "ids that look real"
        recv, expanded, by_expert = ours["numbers"]
        most = case.size * case.capacity
        assert (recv, expanded, by_expert) == (most, most * min(case.topk, case.local_experts), [])


def refusals(group: Any) -> list[Any]:
    case = Case("refused", (4, 4), experts=8)
    batch = make_batch(case, group.rank())
    given = {"topk_idx": batch.topk_idx, "topk_weights": batch.topk_weights, "num_experts": 8}
    buffer = make_buffer(group, case)
    return [
        attempt(lambda: buffer.dispatch(batch.x, **given, do_cpu_sync=False, do_expand=True)),
        attempt(lambda: buffer.dispatch(batch.x, **given, do_cpu_sync=group.rank() == 0)),
    ]


def test_refusals_name_the_remedy() -> None:
    for expanded, mixed in run_ranks(2, refusals):
        assert_report(expanded, InputError, "expanded layout cannot be sized", "do_expand=False")
        assert_report(mixed, GroupMismatchError, "do_cpu_sync")


@pytest.mark.parametrize(
    ("mode", "domains", "waits"), [("on", 2, True), ("on", 1, False), ("off", 2, False)], ids=["refused", "one", "off"]
)
def test_a_deterministic_dispatch_between_hosts_cannot_do_without_a_host_wait(
    mode: str, domains: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Domains that NVLink connects. There is no such job on one machine, so deep_ep is a stand-in, which only notes
    whether it is called to dispatch without a wait."""
    called = []
    monkeypatch.setattr(FakeBuffer, "num_scaleout_ranks", domains, raising=False)
    monkeypatch.setattr(FakeBuffer, "dispatch", lambda self, x, **arguments: called.append(arguments["do_cpu_sync"]))
    monkeypatch.setattr(elastic, "load_class", lambda name: FakeBuffer)
    monkeypatch.setattr(elastic, "check_group_open", lambda group: None)
    monkeypatch.setattr(elastic.ElasticBuffer, "_check_rows", lambda *_: None)  # these rows are on the CPU
    hosts = ["a", "b"] if domains > 1 else ["a", "a"]
    chosen = settings.resolve({}, deterministic=mode == "on", gin="on")
    buffer = elastic.ElasticBuffer(GROUP, SPEC, chosen, hosts)
    rows, ids = torch.zeros(3, 256, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64)
    buffer.dispatch(rows, topk_idx=ids, num_experts=4)
    buffer.dispatch(rows[:1], handle=HANDLE, do_expand=True)
    report = attempt(lambda: buffer.dispatch(rows, topk_idx=ids, num_experts=4, do_cpu_sync=False))
    assert called == [True, None, *([] if waits else [False])]
    if waits:
        words = ("waits on the host", "allow_hybrid_mode=true", "MCORE_DEEPEP_V2_SYNC_FREE", "ALLOW_HYBRID_MODE=off")
        assert_report(report, SettingsError, *words)
    else:
        assert report is None
