"""The plan of redundant experts: against its rule on single rows, all plans of small cases, and what it must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ep_v2.balance.planner import Plan, count, follow, homes, map_selections, overload, plan
from megatron_ep_v2.errors import InputError
from megatron_ep_v2.fused_a2a import fused_dispatch
from tests.helpers.balance_cases import Case, cases, mapped_by_hand, planned_by_hand, selections
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.interpreter import child, needs_triton


def planned(case: Case) -> Plan:
    return plan(case.counts(), case.num_slots, case.min_rows, case.from_percent)


@pytest.mark.slow
def test_plan_and_map_are_the_rule_applied_to_single_rows() -> None:
    replicas = 0
    for case in cases(tokens=9):
        held, _ = planned_by_hand(case)
        found = planned(case)
        assert [[e for e in slots if e >= 0] for slots in found.experts.tolist()] == held, case.name
        mapped = [map_selections(topk_idx, found, rank).tolist() for rank, topk_idx in enumerate(case.topk_idx)]
        assert mapped == mapped_by_hand(case), case.name
        replicas += int((found.experts >= 0).sum())
    assert replicas > 150, "else the cases say nothing"


@pytest.mark.slow
def test_what_every_plan_keeps() -> None:
    for case in cases(tokens=15):
        counts, found = case.counts(), planned(case)
        ranks, local = case.ranks, case.num_experts // case.ranks
        stride = local + case.num_slots
        before = counts.sum(dim=0).view(ranks, -1).sum(dim=1)
        after, mean = found.rank_rows(), -(-int(counts.sum()) // ranks)
        assert after.sum() == before.sum() and after.max() <= before.max(), case.name
        grown = after > before
        assert (after[grown] <= mean).all(), f"{case.name}: a rank was filled above the mean"
        for rank, (held, rows) in enumerate(zip(found.experts.tolist(), found.rows.tolist(), strict=True)):
            used = [expert for expert in held if expert >= 0]
            assert len(set(used)) == len(used) and all(expert // local != rank for expert in used), case.name
            assert held == used + [-1] * (case.num_slots - len(used)), "slots are filled from the first on"
            assert all((n >= case.min_rows) == (expert >= 0) for expert, n in zip(held, rows, strict=True)), case.name
        received = torch.zeros(ranks * stride, dtype=torch.int64)
        for rank, topk_idx in enumerate(case.topk_idx):
            mapped = map_selections(topk_idx, found, rank)
            chosen = topk_idx >= 0
            assert mapped.shape == topk_idx.shape and mapped.dtype == torch.int64
            assert ((mapped >= 0) == chosen).all() and (mapped < ranks * stride).all()
            of_slots = found.experts.flatten().tolist()
            for logical, physical in zip(topk_idx[chosen].tolist(), mapped[chosen].tolist(), strict=True):
                where, number = divmod(physical, stride)
                held = where * local + number if number < local else of_slots[where * case.num_slots + number - local]
                assert held == logical, f"{case.name}: a selection of {logical} goes to a copy of {held}"
                received[physical] += 1
        # Each selection once, and as many to each copy as the plan says.
        by_rank = received.view(ranks, stride)
        assert by_rank[:, :local].flatten().equal(found.home_rows), case.name
        assert by_rank[:, local:].equal(found.rows), case.name
        if not found.rows.any():
            assert after.equal(before)
            if not case.num_slots:
                flat = [map_selections(t, found, rank) for rank, t in enumerate(case.topk_idx)]
                assert all(mapped.equal(t) for mapped, t in zip(flat, case.topk_idx, strict=True))


def test_nothing_planned_is_the_rows_of_no_slots() -> None:
    """Physical ids then differ by the slots that are skipped alone."""
    generator = torch.Generator().manual_seed(0)
    batches = [selections("random", 50, 3, 12, generator) for _ in range(4)]
    case = Case("even", batches, 12, 2, 1, 300)
    found = planned(case)
    assert not found.rows.any() and (found.experts == -1).all()
    for rank, topk_idx in enumerate(batches):
        assert map_selections(topk_idx, found, rank).equal(topk_idx // 3 * 5 + topk_idx % 3)


def test_two_ranks_with_one_slot_get_the_best_of_all_plans() -> None:
    """With two ranks one replica is all that helps: every expert, every number of rows."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        counts = torch.randint(0, 9, (2, 6), generator=generator)
        totals, rank_rows = counts.sum(dim=0).tolist(), counts.sum(dim=0).view(2, 3).sum(dim=1).tolist()
        best = max(rank_rows)
        for expert, total in enumerate(totals):
            for rows in range(total + 1):
                home = expert // 3
                best = min(best, max(rank_rows[home] - rows, rank_rows[1 - home] + rows))
        assert int(plan(counts, 1, 1, 100).rank_rows().max()) == best, counts


@pytest.mark.parametrize(
    ("totals", "limits", "moved"),
    [
        ([2109, 0, 2000, 0], (1, 1, 110), 0),  # 102.7 % of the mean
        ([2109, 0, 1600, 0], (1, 1, 110), 254),  # 113.7 %: half of 509, rounded down
        ([4000, 0, 1953, 0], (1, 1024, 110), 0),  # 1023 rows too many
        ([4000, 0, 1951, 0], (1, 1024, 110), 1024),
        ([4000, 0, 1951, 0], (0, 1024, 110), 0),
    ],
)
def test_limits(totals: list[int], limits: tuple[int, int, int], moved: int) -> None:
    counts = torch.tensor([totals, [0] * 4])
    assert int(plan(counts, *limits).rows.sum()) == moved


@pytest.mark.parametrize(
    ("totals", "experts", "home_rows"),
    [
        ([3, 3, 4, 0, 4, 0], [[-1], [0], [-1]], [2, 3, 4, 0, 4, 0]),  # of two experts, and of two ranks with room
        ([4, 2, 5, 1, 0, 0], [[-1], [-1], [0]], [2, 2, 5, 1, 0, 0]),  # of two busiest ranks
    ],
)
def test_ties_go_to_the_lowest_id(totals: list[int], experts: list[list[int]], home_rows: list[int]) -> None:
    found = plan(torch.tensor([totals, [0] * 6, [0] * 6]), 1, 1, 100)
    assert found.experts.tolist() == experts and found.home_rows.tolist() == home_rows
    assert found.starts.equal(torch.where(found.experts == 0, home_rows[0], 0))


def test_overload_is_the_busiest_rank_over_the_mean() -> None:
    rows = torch.tensor([[6, 2, 1], [0, 0, 0], [5, 5, 5], [9, 0, 0]])
    assert overload(rows).tolist() == [2.0, 1.0, 1.0, 3.0]


@pytest.mark.parametrize(
    ("counts", "limits", "needed"),
    [
        (torch.zeros(2, 5, dtype=torch.int64), (1, 1, 100), "E a multiple of P"),
        (torch.zeros(2, 4), (1, 1, 100), "int64"),
        (torch.zeros(2, 0, dtype=torch.int64), (1, 1, 100), "E logical experts"),
        (torch.zeros(2, 4, dtype=torch.int64), (-1, 1, 100), "num_slots 0 or more"),
        (torch.zeros(2, 4, dtype=torch.int64), (1, 0, 100), "min_rows 1 or more"),
        (torch.zeros(2, 4, dtype=torch.int64), (1, 1, 99), "from_percent 100 or more"),
    ],
)
def test_counts_and_numbers_that_are_refused(counts: torch.Tensor, limits: Any, needed: str) -> None:
    with pytest.raises(InputError, match=needed):
        plan(counts, *limits)


@pytest.mark.parametrize(("topk_idx", "rank"), [(torch.zeros(3, 2), 0), (torch.zeros(3, dtype=torch.int64), 0)])
def test_selections_that_are_refused(topk_idx: torch.Tensor, rank: int) -> None:
    found = plan(torch.zeros(2, 4, dtype=torch.int64), 1)
    with pytest.raises(InputError, match="topk_idx \\[T, K\\] int64"):
        map_selections(topk_idx, found, rank)
    with pytest.raises(InputError, match="from 0 to 1"):
        map_selections(torch.zeros(3, 2, dtype=torch.int64), found, 2)


@isolated
def dispatch_to_replicas(group: Any) -> Any:
    """Count, gather, plan, map, and a real dispatch to physical ids: the plan, and the rows that arrive per copy."""
    experts, tokens = 4 * group.size(), 40 - 5 * group.rank()
    topk_idx = selections("one-hot", tokens, 3, experts, torch.Generator().manual_seed(group.rank()))
    topk_idx[::7, 2] = -1
    mine = count(topk_idx, experts)
    counts = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(counts, mine, group=group)
    found = plan(torch.stack(counts), 2, min_rows=5)
    mapped = map_selections(topk_idx, found, group.rank())
    weights, physical = torch.ones(tokens, 3), experts + 2 * group.size()
    rows = fused_dispatch(torch.randn(tokens, 8), mapped, weights, physical, group, do_expand=True)[3]
    return found.experts.tolist(), found.rank_rows().tolist(), found.rows[group.rank()].tolist(), rows.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_dispatch_to_physical_ids_brings_the_planned_rows(ranks: int) -> None:
    answers = run_ranks(ranks, dispatch_to_replicas)
    plans = [answer[:2] for answer in answers]
    assert plans == plans[:1] * ranks, "the same plan on every rank"
    for rank, (_, rank_rows, of_slots, received) in enumerate(answers):
        assert received[4:] == of_slots and sum(received) == rank_rows[rank]
    rank_rows = answers[0][1]
    assert max(rank_rows) - min(rank_rows) < ranks + 5, "one expert was selected by every token"


INTERPRET = """
import json
from megatron_ep_v2.balance import planner, planner_triton
from tests.helpers.balance_cases import differences

print(json.dumps(differences(planner_triton, planner, "cpu", tokens=45)))
"""


@pytest.mark.slow
@needs_triton
def test_the_kernels_equal_the_definition_in_tritons_interpreter() -> None:
    assert child(INTERPRET, TRITON_INTERPRET="1") == []


COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_ep_v2.balance import planner_triton

KERNELS = {
    planner_triton._plan: (6, "*i64", 5, {"RANKS": 8, "LOCAL": 32, "SLOTS": 2}),
    planner_triton._count: (2, "*i64 *i32", 3, {"EXPERTS": 256, "BLOCK": 128}),
    planner_triton._map: (7, "*i64 *i32 " + "*i64 " * 5, 6, {"SEGMENTS": 16, "BLOCK": 128}),
}
found = {}
for kernel, (pointers, kinds, numbers, constants) in KERNELS.items():
    kinds = kinds.split() if " " in kinds else [kinds] * pointers
    kinds += ["i32"] * numbers + ["constexpr"] * len(constants)
    source = ASTSource(kernel, dict(zip(kernel.arg_names, kinds, strict=True)), constants,
                       {(i,): [["tt.divisibility", 16]] for i in range(pointers)})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    found[kernel.__name__] = "atom" in ptx or ".red." in ptx
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_triton
def test_the_kernels_compile_for_gpus_without_atomics(tmp_path: Path) -> None:
    assert child(COMPILE, TRITON_CACHE_DIR=str(tmp_path)) == {"_plan": False, "_count": False, "_map": False}


def test_a_second_run_goes_where_the_first_went() -> None:
    """In another order, with an expert that the first did not select, and without a selection."""
    case = next(case for case in cases() if case.name == "zipf 4 x 4 R=2 seed 0")
    planned = plan(case.counts(), case.num_slots, case.min_rows, case.from_percent)
    for rank, topk_idx in enumerate(case.topk_idx):
        physical = map_selections(topk_idx, planned, rank)
        home = homes(case.num_experts, case.ranks, case.num_slots)
        again = topk_idx.flip(1).clone()
        again[0, 0], again[1, 1] = -1, next(e for e in range(case.num_experts) if e not in topk_idx[1])
        wanted = physical.flip(1).clone()
        wanted[0, 0], wanted[1, 1] = -1, again[1, 1] // 4 * 6 + again[1, 1] % 4
        assert follow(again, topk_idx, physical, home).equal(wanted)
