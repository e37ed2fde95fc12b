"""The first dispatch of a group: a rank that cannot build its buffer does not leave the others waiting."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.fused_a2a import fused_dispatch
from tests.helpers.harness import isolated, run_ranks

CULPRIT = 1


def dispatch(group: Any) -> tuple[str, str]:
    topk_idx = torch.rand(5, 8).topk(3, dim=1).indices
    try:
        fused_dispatch(torch.randn(5, 16), topk_idx, torch.rand(5, 3), 8, group)
    except EPError as error:
        return type(error).__name__, str(error)
    return "none", ""


@isolated
def one_rank_asks_for_deep_ep(group: Any) -> list[tuple[str, str]]:
    settings.activate(settings.resolve(buffer="elastic" if group.rank() == CULPRIT else "reference"))
    first = dispatch(group)
    settings.activate(settings.resolve(buffer="reference"))
    return [first, dispatch(group)]


def test_a_rank_without_a_buffer_is_reported_on_all() -> None:
    answers = run_ranks(4, one_rank_asks_for_deep_ep)
    for rank, ((kind, text), after) in enumerate(answers):
        assert kind == ("UnavailableError" if rank == CULPRIT else "PeerError"), text
        assert rank == CULPRIT or f"rank {CULPRIT} refused" in text
        assert after == ("none", ""), "the group must stay usable"


@isolated
def two_groups(group: Any) -> list[int]:
    other = torch.distributed.new_group(list(range(group.size())))
    dispatch(group)
    dispatch(group)
    dispatch(other)
    counts = [len(pool.buffers())]
    pool.destroy_buffers(other)
    counts.append(len(pool.buffers()))
    pool.destroy_buffers()
    pool.destroy_buffers()
    return [*counts, len(pool.buffers())]


def test_one_buffer_per_group_and_an_idempotent_teardown() -> None:
    assert run_ranks(2, two_groups) == [[2, 1, 0]] * 2
