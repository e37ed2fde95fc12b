"""Bad input: every rank gets an error that says what to do, no rank waits, and the group stays usable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ep_v2.errors import GroupMismatchError, InputError, PeerError, TokenCapacityError
from megatron_ep_v2.fused_a2a import fused_dispatch
from tests.helpers.cases import Case, make_batch
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.reports import Report, assert_report, attempt

CAPACITY = "MCORE_DEEPEP_V2_MAX_TOKENS_PER_RANK"
Change = Callable[[dict[str, Any]], dict[str, Any]]  # good arguments -> those that replace some of them

CULPRIT = 1  # the rank that does wrong where only one does


def good_arguments(group: Any) -> dict[str, Any]:
    batch = make_batch(Case("good", (6, 4, 5, 6)[: group.size()], experts=8), group.rank())
    return {
        "x": batch.x,
        "token_indices": batch.topk_idx,
        "token_probs": batch.topk_weights,
        "num_experts": 8,
        "group": group,
    }


def set_selection(topk_idx: torch.Tensor, value: int) -> torch.Tensor:
    topk_idx = topk_idx.clone()
    topk_idx[2, 1] = value
    return topk_idx


def repeat_selection(topk_idx: torch.Tensor) -> torch.Tensor:
    topk_idx = topk_idx.clone()
    topk_idx[3, 2] = topk_idx[3, 0]
    return topk_idx


def more_selections(arguments: dict[str, Any]) -> dict[str, Any]:
    tokens = len(arguments["x"])
    return {
        "token_indices": torch.arange(33).repeat(tokens, 1),
        "token_probs": torch.ones(tokens, 33),
        "num_experts": 64,
    }


def more_tokens(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name].repeat(2, 1) for name in ("x", "token_indices", "token_probs")}


def fewer_selections(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name][:, :2] for name in ("token_indices", "token_probs")}


# name -> (what to change in good arguments, what the error of the rank that did it must say)
REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "indivisible-experts": (lambda a: {"num_experts": 7}, ("num_experts=7", "2")),
    "no-experts": (lambda a: {"num_experts": 0}, ("num_experts=0",)),
    "int32-indices": (lambda a: {"token_indices": a["token_indices"].int()}, ("torch.int32", "torch.int64")),
    "id-too-high": (lambda a: {"token_indices": set_selection(a["token_indices"], 8)}, ("token 2", "8", "0 to 7")),
    "id-below-minus-one": (lambda a: {"token_indices": set_selection(a["token_indices"], -2)}, ("token 2", "-2")),
    "duplicate-id": (lambda a: {"token_indices": repeat_selection(a["token_indices"])}, ("token 3", "twice")),
    "fewer-index-rows": (lambda a: {"token_indices": a["token_indices"][1:]}, ("topk_idx",)),
    "narrow-probs": (lambda a: {"token_probs": a["token_probs"][:, 1:]}, ("topk_weights",)),
    "bf16-probs": (lambda a: {"token_probs": a["token_probs"].bfloat16()}, ("bfloat16", "float32")),
    "3-d-hidden": (lambda a: {"x": a["x"][None]}, ("matrix", "[tokens, hidden]")),
    "integer-hidden": (lambda a: {"x": a["x"].int()}, ("int32",)),
    "1-d-hidden": (lambda a: {"x": a["x"][:, 0]}, ("matrix", "[tokens, hidden]")),
    "1-d-indices": (lambda a: {"token_indices": a["token_indices"][:, 0]}, ("topk_idx",)),
    "top-33": (more_selections, ("33", "32")),
}


def bad_then_good(arguments: dict[str, Any], change: Change | None) -> list[Report | None]:
    """The errors of a call with changed arguments, and of a good call after it."""
    bad = {**arguments, **change(arguments)} if change else arguments
    return [attempt(lambda: fused_dispatch(**bad)), attempt(lambda: fused_dispatch(**arguments))]


@isolated
def refuse(group: Any, name: str, culprits: list[int], warm: bool) -> list[Report | None]:
    arguments = good_arguments(group)
    if warm:
        fused_dispatch(**arguments)
    change = REFUSED[name][0] if group.rank() in culprits else None
    return bad_then_good(arguments, change)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_on_every_rank(name: str) -> None:
    for rank, (report, after) in enumerate(run_ranks(2, refuse, name, [0, 1], False)):
        assert_report(report, InputError, f"rank {rank}", *REFUSED[name][1])
        assert after is None, f"the group must stay usable: {after}"


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_on_one_rank_of_a_running_job(name: str) -> None:
    reports = run_ranks(2, refuse, name, [CULPRIT], True)
    assert_report(reports[CULPRIT][0], InputError, f"rank {CULPRIT}", *REFUSED[name][1])
    assert_report(reports[0][0], PeerError, f"rank {CULPRIT}")
    assert [after for _, after in reports] == [None, None]


@pytest.mark.parametrize("name", ["int32-indices", "id-too-high", "1-d-hidden"])
def test_bad_input_on_one_rank_at_the_first_call(name: str) -> None:
    reports = run_ranks(2, refuse, name, [CULPRIT], False)
    for report, _ in reports:
        assert report is not None and f"rank {CULPRIT}" in report.text and report.fix
    assert [after for _, after in reports] == [None, None]


@isolated
def exceed_capacity(group: Any, first: bool) -> list[Report | None]:
    arguments = good_arguments(group)
    if not first:
        fused_dispatch(**arguments)
    return bad_then_good(arguments, more_tokens if group.rank() == CULPRIT else None)


@pytest.mark.parametrize("first", [True, False], ids=["first call", "later call"])
def test_too_many_tokens_on_one_rank(first: bool) -> None:
    reports = run_ranks(2, exceed_capacity, first, env={CAPACITY: "7"})
    assert_report(reports[CULPRIT][0], TokenCapacityError, "rank 1 has 8 tokens", "=7", f"{CAPACITY}=8")
    assert_report(reports[0][0], PeerError, f"rank {CULPRIT}")
    assert [after for _, after in reports] == [None, None]


@isolated
def agreed_capacity(group: Any) -> int:
    *_, handle = fused_dispatch(**good_arguments(group))
    return handle.num_max_tokens_per_rank


def test_capacity_is_the_groups_and_not_the_ranks() -> None:
    assert run_ranks(2, agreed_capacity) == [6, 6], "the most tokens of any rank at the first dispatch"
    assert run_ranks(2, agreed_capacity, env={CAPACITY: "50"}) == [50, 50]


DIFFERENT: dict[str, tuple[Change, str]] = {
    "hidden": (lambda a: {"x": a["x"][:, :16]}, "hidden"),
    "top-k": (fewer_selections, "top-k"),
    "num_experts": (lambda a: {"num_experts": 16}, "num_experts"),
    "dtype": (lambda a: {"x": a["x"].bfloat16()}, "dtype"),
    "layout": (lambda a: {"do_expand": True}, "do_expand"),
    "alignment": (lambda a: {"do_expand": False, "expert_alignment": 16}, "expert_alignment"),
}


@isolated
def disagree(group: Any, name: str, warm: bool) -> list[Report | None]:
    arguments = good_arguments(group)
    if warm:
        fused_dispatch(**arguments)
    return bad_then_good(arguments, DIFFERENT[name][0] if group.rank() == CULPRIT else None)


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_that_disagree(name: str, warm: bool) -> None:
    """One of four differs, so that there is one to name."""
    reports = run_ranks(4, disagree, name, warm)
    for report, after in reports:
        assert_report(report, GroupMismatchError, f"rank {CULPRIT}", DIFFERENT[name][1])
        assert after is None
