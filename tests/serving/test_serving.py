"""The prepare/finalize pair on the reference buffer: prefill and decode against a dense layer in fp64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megatron_ep_v2 import destroy_buffers, settings
from megatron_ep_v2.errors import ClosedError, GroupMismatchError, InputError, PeerError, TokenCapacityError
from megatron_ep_v2.serving import Decode, DecodeGraphs, Prefill, PrepareFinalize, bucket_of, buckets_up_to
from tests.helpers.cases import Case, make_batch, make_batches
from tests.helpers.compare import assert_close
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.reports import Report, assert_report, attempt

RANKS, HIDDEN = 4, 40  # widened to 256
CASE = Case("decode", (3, 0, 4, 1), "drop some selections", experts=8, hidden=HIDDEN, dtype=torch.float64)
NEXT = Case("next", (1, 2, 0, 7), experts=8, hidden=HIDDEN, dtype=torch.float64)


def factor(expert: torch.Tensor) -> torch.Tensor:
    """Each expert multiplies by a number of its own, known by its global id."""
    return 1.0 + 0.25 * expert.double()


def make_pair(group: Any, **more: Any) -> PrepareFinalize:
    sizes = {"hidden": HIDDEN, "num_experts": 8, "num_topk": 3, "max_prefill_tokens": 9, "max_decode_tokens": 8}
    return PrepareFinalize(group, **{**sizes, "dtype": torch.float64, **more})


def run_prefill(work: Prefill, rank: int) -> torch.Tensor:
    mine = torch.tensor(work.tokens_per_expert)
    assert work.rows.shape == (mine.sum(), HIDDEN)
    experts = torch.repeat_interleave(torch.arange(len(mine)) + rank * len(mine), mine)
    return work.rows * (work.weights.double() * factor(experts))[:, None]


def run_decode(work: Decode, first_id: int) -> torch.Tensor:
    """first_id: what has to be added to the ids to make them global. Garbage in, garbage out, where none reads."""
    selected = work.topk_idx >= 0
    ids = work.topk_idx.clamp(min=0) + first_id
    return work.rows * (factor(ids) * work.topk_weights.double()).masked_fill(~selected, 0.0).sum(dim=1)[:, None]


def dense(case: Case, rank: int) -> torch.Tensor:
    batch = make_batches(case)[rank]
    selected = batch.topk_idx >= 0
    factors = (factor(batch.topk_idx.clamp(min=0)) * batch.topk_weights.double()).masked_fill(~selected, 0.0)
    return batch.x.double() * factors.sum(dim=1)[:, None]


def given(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = make_batch(case, rank)
    return batch.x, batch.topk_idx, batch.topk_weights


@isolated
def every_way(group: Any, global_ids: bool) -> dict[str, torch.Tensor]:
    rank, offset = group.rank(), group.rank() * 2
    pair = make_pair(group, slots=2, global_ids=global_ids, expert_alignment=4)
    first_id = 0 if global_ids else offset
    found = {"prefill": pair.finalize(run_prefill(pair.prepare_prefill(*given(CASE, rank)), rank))}
    one = pair.prepare_decode(*given(CASE, rank), bucket=4)
    two = pair.prepare_decode(*given(NEXT, rank), bucket=8, slot=1)  # while the first is on its way
    assert len(one.rows) == RANKS * 4 and len(two.rows) == RANKS * 8
    for work in (one, two):
        real = int(work.num_recv)
        assert (work.topk_idx[real:] == -1).all() and (work.topk_idx[:real] >= 0).any(dim=1).all()
        held = work.topk_idx[work.topk_idx >= 0] + first_id
        assert ((held >= offset) & (held < offset + 2)).all(), "ids of another rank"
        assert work.rows[real:].isnan().all()
    found["slot 1"] = pair.finalize(run_decode(two, first_id), slot=1)
    found["slot 0"] = pair.finalize(run_decode(one, first_id))

    graphs = DecodeGraphs(pair, lambda work: run_decode(work, first_id), "cpu")
    graphs.capture()
    for name, case, bucket in (("graph", CASE, 8), ("graph, next", NEXT, 8), ("graph, first", CASE, 4)):
        found[name] = graphs(*given(case, rank), bucket=bucket).clone()
    return found


@pytest.mark.parametrize("global_ids", [False, True], ids=["local ids", "global ids"])
def test_tokens_come_back_as_from_a_dense_layer(global_ids: bool) -> None:
    cases = {"slot 1": NEXT, "graph, next": NEXT}
    for rank, found in enumerate(run_ranks(RANKS, every_way, global_ids)):
        for name, output in found.items():
            assert_close(name, output, dense(cases.get(name, CASE), rank), 1e-14)


def refusals(group: Any) -> dict[str, Any]:
    rank = group.rank()
    x, ids, weights = given(CASE, rank)
    wide = x.new_zeros(9, HIDDEN)
    many = (wide, torch.full((9, 3), -1), torch.zeros(9, 3))

    def twice(pair: PrepareFinalize) -> None:
        """All ranks but one prepare again, where that one finalizes: its call raises too, and it can call again."""
        rows = run_decode(pair.prepare_decode(x, ids, weights, bucket=4), 2 * rank)
        try:
            if rank:
                pair.prepare_decode(x, ids, weights, bucket=4)
            else:
                pair.finalize(rows)
        finally:
            pair.finalize(rows)

    pair = make_pair(group)
    graphs = DecodeGraphs(pair, lambda work: run_decode(work, 2 * rank), "cpu")
    found = {
        "full": attempt(lambda: pair.prepare_decode(*many, bucket=8)),
        "graph": attempt(lambda: graphs(*many, bucket=8)),
        "no power": attempt(lambda: pair.prepare_decode(x, ids, weights, bucket=6)),
        "nothing": attempt(lambda: pair.finalize(x)),
        "busy": attempt(lambda: twice(pair)),
        "mixed": attempt(lambda: pair.prepare_decode(x, ids, weights, bucket=4 if rank else 8)),
    }
    return found


@isolated
def after_the_end(group: Any) -> tuple[int, Report | None]:
    """Graphs that are left after their buffer, and what the next call says."""
    pair, rank = make_pair(group), group.rank()
    graphs = DecodeGraphs(pair, lambda work: run_decode(work, 2 * rank), "cpu")
    graphs(*given(CASE, rank), bucket=4)
    destroy_buffers()
    return len(graphs._by_bucket), attempt(lambda: graphs(*given(CASE, rank), bucket=4))


def test_decode_in_a_graph_is_refused_after_its_buffer_was_destroyed() -> None:
    """A replay would write to memory that is another's."""
    for left, said in run_ranks(RANKS, after_the_end):
        assert not left
        assert_report(said, ClosedError, "was destroyed")


@isolated
def refuse(group: Any) -> dict[str, Any]:
    found = refusals(group)
    destroy_buffers()
    settings.activate(settings.resolve(num_max_tokens_per_rank=4))
    found["small"] = attempt(lambda: make_pair(group))
    return found


def test_refusals_name_the_remedy() -> None:
    for rank, found in enumerate(run_ranks(RANKS, refuse)):
        for name in ("full", "graph"):
            assert_report(found[name], InputError, "9 tokens", "bucket of 8", "at least 16")
        if rank:
            assert_report(found["busy"], InputError, "slot 0 still holds", "slots=2")
        else:
            assert_report(found["busy"], PeerError, "refused")
        assert_report(found["no power"], InputError, "bucket of 6")
        assert_report(found["nothing"], InputError, "nothing was prepared in slot 0")
        assert_report(found["mixed"], GroupMismatchError, "num_max_tokens_per_rank")
        assert_report(found["small"], TokenCapacityError, "9 tokens", "num_max_tokens_per_rank=4")


@isolated
def keep_a_slot_on_one_rank(group: Any) -> tuple[list[Report | None], bool]:
    """Rank 0 forgets to abandon its slot after an error: what each rank's next prepare says, prefill and decode, and
    whether the pair goes on once it did."""
    pair, tokens = make_pair(group), given(CASE, group.rank())
    outcomes = []
    for prepare in (pair.prepare_prefill, functools.partial(pair.prepare_decode, bucket=4)):
        prepare(*tokens)
        if group.rank():
            pair.abandon()
        outcomes.append(attempt(lambda prepare=prepare: prepare(*tokens)))
        pair.abandon()
    work = pair.prepare_prefill(*tokens)
    y = pair.finalize(run_prefill(work, group.rank()))
    assert_close("output", y, dense(CASE, group.rank()), 1e-13)
    return outcomes, True


def test_a_slot_that_one_rank_kept_is_refused_on_all() -> None:
    first, *others = run_ranks(RANKS, keep_a_slot_on_one_rank)
    for report in first[0]:
        assert_report(report, InputError, "slot 0 still holds", "abandon it, after an error")
    for outcomes, _ in others:
        for report in outcomes:
            assert_report(report, PeerError, "because rank 0 refused")


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (512, 512), (513, 1024)]
)
def test_buckets_are_powers_of_two(tokens: int, bucket: int) -> None:
    assert bucket_of(tokens) == bucket
    assert buckets_up_to(tokens)[-1] == bucket and buckets_up_to(tokens) == sorted(
        {bucket_of(i) for i in range(tokens + 1)}
    )


RIGHT, LARGER = "bucket=bucket_of(most tokens of any rank), which is", "make PrepareFinalize with max_decode_tokens of"
HINTS = {  # by tokens and bucket
    (3, 6): f"{RIGHT} at least 4 here",
    (5, 4): f"{RIGHT} at least 8 here",
    (0, 0): f"{RIGHT} at least 1 here",
    (3, 16): f"{LARGER} at least 16; else {RIGHT} at least 4 here",
    (2, 100): f"{LARGER} at least 128; else {RIGHT} at least 2 here",
    (9, 8): f"{LARGER} at least 16, or pass so many to prepare_prefill",
    (9, 16): f"{LARGER} at least 16, or pass so many to prepare_prefill",
}


@isolated
def bring_wrong_buckets(group: Any) -> list[Report | None]:
    settings.activate(settings.resolve(buffer="reference"))
    sizes = {"hidden": 256, "num_experts": 4, "num_topk": 1, "max_prefill_tokens": 16, "max_decode_tokens": 8}
    pair = PrepareFinalize(group, **sizes)
    reports = []
    for tokens, bucket in HINTS:
        ids = torch.zeros(tokens, 1, dtype=torch.int64)
        batch = torch.ones(tokens, 256, dtype=torch.bfloat16), ids, torch.ones(ids.shape)
        reports.append(attempt(functools.partial(pair.prepare_decode, *batch, bucket=bucket)))
    return reports


def test_a_wrong_bucket_is_answered_with_one_that_would_do() -> None:
    for (tokens, bucket), report in zip(HINTS, run_ranks(1, bring_wrong_buckets)[0], strict=True):
        assert_report(report, InputError, f"{tokens} tokens cannot be decoded in a bucket of {bucket}", "up to 8 that")
        assert report is not None and report.fix == HINTS[tokens, bucket]
