"""Captured graphs are dropped while the buffers and process groups that they use still live."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2 import graphs
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.fused_a2a import fused_dispatch
from tests.helpers.harness import isolated, run_ranks


class Keeper:
    """What lives whenever it is asked to drop its graphs: buffers, and whether the group does."""

    def __init__(self, group: Any):
        self.group = group
        self.dropped: list[tuple[int, bool]] = []
        graphs.register(self)

    def drop(self) -> None:
        self.dropped.append((len(pool.buffers()), self.group in dist.distributed_c10d._world.pg_map))


def destroy_buffers(group: Any) -> None:
    pool.destroy_buffers(group)
    dist.barrier()


def destroy_all_buffers(group: Any) -> None:
    megatron_ep_v2.destroy_buffers()
    dist.barrier()


def destroy_group(group: Any) -> None:
    dist.destroy_process_group(group)


def destroy_world(group: Any) -> None:
    dist.destroy_process_group()


def destroy_group_without_buffer(group: Any) -> None:
    dist.destroy_process_group(dist.new_group([0]))


def unseen_destroy(group: Any, unseen: Callable[[Any], None]) -> None:
    """A trainer's own reference, of before `install()`: noticed when the next buffer is built."""
    unseen(group)
    dispatch(dist.group.WORLD)


def dispatch(group: Any) -> None:
    ids, probs = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    fused_dispatch(torch.zeros(2, 256), ids, probs, group.size(), group)


@isolated
def dropped_when(group: Any, destroy: Callable[[Any], None]) -> list[tuple[int, bool]]:
    megatron_ep_v2.uninstall()
    unseen = dist.destroy_process_group
    megatron_ep_v2.install(buffer="reference", num_max_tokens_per_rank=2)
    own = dist.new_group()
    dispatch(own)
    keeper = Keeper(own)
    if destroy is unseen_destroy:
        unseen_destroy(own, unseen)
    else:
        destroy(own)
    first = keeper.dropped[:1]
    megatron_ep_v2.uninstall()
    return first


@pytest.mark.parametrize("destroy", [destroy_buffers, destroy_all_buffers, destroy_group, destroy_world])
def test_graphs_go_before_what_they_use(destroy: Callable[[Any], None]) -> None:
    assert run_ranks(2, dropped_when, destroy) == [[(1, True)]] * 2


def test_graphs_outlive_a_group_that_has_no_buffer() -> None:
    """Which may be of some ranks only."""
    assert run_ranks(2, dropped_when, destroy_group_without_buffer) == [[]] * 2


def test_graphs_of_a_group_whose_end_was_not_seen_go_before_its_buffer() -> None:
    assert run_ranks(2, dropped_when, unseen_destroy) == [[(1, False)]] * 2


def test_a_keeper_is_not_kept() -> None:
    keeper = Keeper(None)
    alive = weakref.ref(keeper)
    del keeper
    gc.collect()
    assert alive() is None
    graphs.drop_all()
