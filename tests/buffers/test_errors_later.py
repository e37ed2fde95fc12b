"""Errors after a buffer or its group was closed; and the errors themselves."""

from __future__ import annotations

import ast
import inspect
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2 import errors
from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.errors import ClosedError, EPError, SettingsError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.settings import resolve
from tests.helpers.cases import Case, make_batch
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.reports import Report, assert_report, attempt

CASE = Case("good", (6, 4), experts=8)
SPEC = BufferSpec(num_max_tokens_per_rank=6, hidden=CASE.hidden, num_topk=CASE.topk, num_experts=CASE.experts)


@isolated
def use_after_destroy(group: Any) -> list[Report | None]:
    buffer, batch = ReferenceBuffer(group, SPEC), make_batch(CASE, group.rank())
    recv_x, _, _, handle, _ = buffer.dispatch(batch.x, topk_idx=batch.topk_idx, num_experts=CASE.experts)
    buffer.destroy()
    return [
        attempt(lambda: buffer.combine(recv_x, handle)),
        attempt(lambda: buffer.dispatch(batch.x, topk_idx=batch.topk_idx, num_experts=CASE.experts)),
        attempt(lambda: buffer.dispatch(batch.x, handle=handle)),
    ]


def test_a_destroyed_buffer_says_so() -> None:
    for report in itertools.chain(*run_ranks(2, use_after_destroy)):
        assert_report(report, ClosedError, "destroyed")


@isolated
def use_after_close(group: Any, subgroup: bool) -> list[Report | None]:
    """A dispatch, a combine and a backward in a process group that was destroyed."""
    used = dist.new_group(list(range(group.size()))) if subgroup else group
    batch = make_batch(CASE, group.rank())
    arguments = (batch.x.requires_grad_(), batch.topk_idx, batch.topk_weights, CASE.experts, used)
    recv_x, *_, handle = fused_dispatch(*arguments)
    output, _ = fused_combine(recv_x, used, handle)
    dist.destroy_process_group(used)
    return [
        attempt(lambda: fused_dispatch(*arguments)),
        attempt(lambda: fused_combine(recv_x, used, handle)),
        attempt(output.sum().backward),
    ]


@pytest.mark.parametrize("subgroup", [True, False], ids=["subgroup", "world"])
def test_a_closed_process_group_says_so(subgroup: bool) -> None:
    for report in itertools.chain(*run_ranks(2, use_after_close, subgroup)):
        assert_report(report, ClosedError, "closed")


def test_a_setting_that_cannot_be_used_names_its_variable() -> None:
    for value in ("many", "-1", "1.5"):
        report = attempt(lambda value=value: resolve({"MCORE_DEEPEP_V2_MAX_TOKENS_PER_RANK": value}))
        assert_report(report, SettingsError, "MCORE_DEEPEP_V2_MAX_TOKENS_PER_RANK", value)
    assert_report(attempt(lambda: resolve({}, capacity=3)), SettingsError, "capacity", "num_max_tokens_per_rank")


ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, EPError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_survive_the_way_between_processes(kind: type[EPError]) -> None:
    error = kind("it broke", found="3", needed="4", fix="add one")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error) == "it broke\n  found: 3\n  needed: 4\n  fix: add one"
    assert (copy.what, copy.found, copy.needed, copy.fix) == ("it broke", "3", "4", "add one")


def test_every_error_that_is_raised_comes_with_a_fix() -> None:
    names, seen = {kind.__name__ for kind in ERRORS}, 0
    for path in Path(megatron_ep_v2.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) in names:
                seen += 1
                assert "fix" in {keyword.arg for keyword in node.keywords}, f"{path.name}:{node.lineno}"
    assert seen > 10
