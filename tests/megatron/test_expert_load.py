"""Expert load: against counts of the selections themselves, on the host and per layer, once for each token."""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import megatron_ep_v2
from megatron_ep_v2 import recompute, settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import GroupMismatchError
from megatron_ep_v2.fused_a2a import fused_dispatch
from megatron_ep_v2.megatron import expert_load
from megatron_ep_v2.sync_free import sync_free_combine, sync_free_dispatch
from tests.helpers.cases import SMALL, make_batch
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups, step
from tests.helpers.shapes import CPU


def selected(group: Any, layers: list[Any], hidden: list[torch.Tensor]) -> list[list[int]]:
    """How often the routers of all ranks select each expert."""
    totals = []
    for layer, tokens in zip(layers, hidden, strict=True):
        counts = layer.router(tokens)[1].sum(dim=0)
        torch.distributed.all_reduce(counts)
        totals.append(counts.tolist())
    return totals


def count_layers(group: Any, layout: str, padded: bool) -> tuple[Any, ...]:
    """Two layers, the second with other tokens and two micro-batches; then nothing."""
    with process_groups():
        layers = [make_layer(CPU, "flex", layout)]
        manager = layers[0].token_dispatcher._comm_manager
        second = type(manager)(
            manager.group, manager.num_local_experts, manager.router_topk, manager.num_experts, manager.config
        )
        if padded:
            manager._expert_alignment = second._expert_alignment = lambda: 16
        hidden = hidden_states(CPU, CPU.tokens - 3 * group.rank(), 1)
        step(layers[0], hidden)
        layers[0].token_dispatcher._comm_manager = second
        step(layers[0], hidden, micro_batches=2)
        gc.collect()
        counts = [counts.tolist() for counts in megatron_ep_v2.expert_load()]
        expected = selected(group, layers * 3, [hidden, hidden, hidden * 2])
        empty = [int(counts.sum()) for counts in megatron_ep_v2.expert_load()]
        return counts, [expected[0], [a + b for a, b in zip(*expected[1:], strict=True)]], empty


@pytest.mark.parametrize(("layout", "padded"), [("compact", False), ("expanded", False), ("expanded", True)])
def test_the_counts_are_those_of_the_routers(layout: str, padded: bool) -> None:
    for counts, expected, empty in run_ranks(2, count_layers, layout, padded):
        assert counts[-2:] == expected
        assert empty[-2:] == [0, 0]


@isolated
def log(group: Any) -> Any:
    """One even layer, one where the first expert gets all, one that was not used."""
    layers = [expert_load.ExpertLoad(group, 2) for _ in range(3)]
    layers[0].add(torch.tensor([3, 3]))
    layers[1].add(torch.tensor([8 * (group.rank() == 0), 0], dtype=torch.int32))
    written: list[Any] = []
    if group.rank() == 1:  # as Megatron, which opens its writers on the last rank
        sys.modules["megatron.training.global_vars"] = SimpleNamespace(  # type: ignore[assignment]
            _GLOBAL_TENSORBOARD_WRITER=SimpleNamespace(add_scalar=lambda *item: written.append(item)),
            _GLOBAL_WANDB_WRITER=SimpleNamespace(log=lambda *item: written.append(item)),
        )
    try:
        return megatron_ep_v2.log_expert_load(7), written, megatron_ep_v2.log_expert_load(8)
    finally:
        sys.modules.pop("megatron.training.global_vars", None)


def test_scalars_for_megatrons_loggers() -> None:
    scalars = {
        "moe/busiest_expert": 2.5,
        "moe/idle_experts": 3.0,
        "moe/overload_mean": 1.5,
        "moe/overload_max": 2.0,
        "moe/layer_0/busiest_expert": 1.0,
        "moe/layer_0/overload_mean": 1.0,
        "moe/layer_0/overload_max": 1.0,
        "moe/layer_1/busiest_expert": 4.0,
        "moe/layer_1/overload_mean": 2.0,
        "moe/layer_1/overload_max": 2.0,
    }
    first, last = run_ranks(2, log, fresh=True)
    assert first == (scalars, [], {})
    assert last == (scalars, [*((name, value, 7) for name, value in scalars.items()), (scalars, 7)], {})


def overloads_of_layers(group: Any, layout: str) -> tuple[list[float], Any]:
    """Three micro-batches of different tokens through one layer: by the routers' own choice, and by its counts."""
    with process_groups():
        layer = make_layer(CPU, "flex", layout, "grouped")
        expected = []
        for seed in range(3):
            hidden = hidden_states(CPU, CPU.tokens - 3 * group.rank(), 1, seed=seed)
            (counts,) = selected(group, [layer], [hidden])
            local = len(counts) // group.size()
            by_rank = [sum(counts[first : first + local]) for first in range(0, len(counts), local)]
            expected.append(max(by_rank) * group.size() / sum(by_rank))
            step(layer, hidden)
        gc.collect()
        return expected, megatron_ep_v2.overload()[-1]


@pytest.mark.parametrize("layout", ["compact", "expanded", "sync-free"])
def test_the_overload_is_that_of_the_routers(layout: str) -> None:
    for expected, found in run_ranks(2, overloads_of_layers, layout):
        assert found.dispatches == len(set(expected)) == 3
        assert found.mean == pytest.approx(sum(expected) / 3) and found.largest == pytest.approx(max(expected))


def add_on_device(layer: expert_load.ExpertLoad, counts: torch.Tensor) -> None:
    """As counts on a GPU are added, next to those on the host."""
    if layer._device is None:
        layer._device = layer._zeros(torch.device("cpu"))
    layer.load_on(torch.device("cpu"))
    layer._device[(layer._number - 1) % expert_load.DISPATCHES] += counts


@isolated
def busy_in_turn(group: Any) -> Any:
    """Each rank is the busiest once, with all rows of a dispatch, on the host and on the device."""
    layers = [expert_load.ExpertLoad(group, 2) for _ in range(2)]
    for busiest in range(group.size()):
        counts = torch.tensor([4, 2]) * (busiest == group.rank())
        layers[0].add(counts)
        (add_on_device if busiest else expert_load.ExpertLoad.add)(layers[1], counts)
    readings = expert_load.read()
    layers[0].add(torch.tensor([1, 1]))
    return [(r.tokens.tolist(), r.overload) for r in readings], megatron_ep_v2.overload()


def test_sums_do_not_hide_who_is_busy_in_turn() -> None:
    for readings, later in run_ranks(2, busy_in_turn):
        assert readings == [([4, 2, 4, 2], expert_load.Overload(2.0, 2.0, 2))] * 2
        assert later == [expert_load.Overload(1.0, 1.0, 1), expert_load.Overload(1.0, 1.0, 0)]


@isolated
def many_dispatches(group: Any, number: int, uneven: int) -> Any:
    """On rank 0 all rows of the first dispatches; then as many on each. All have another number of rows."""
    layer = expert_load.ExpertLoad(group, 2)
    for n in range(number):
        counts = torch.tensor([n + 1, 0]) if n >= uneven or group.rank() == 0 else torch.tensor([0, 0])
        (add_on_device if n % 3 else expert_load.ExpertLoad.add)(layer, counts)
    return [(reading.tokens.tolist(), reading.overload) for reading in expert_load.read()]


@pytest.mark.parametrize(
    ("number", "uneven", "expected"),
    [
        (256, 1, (1 + 1 / 256, 2.0, 256)),  # all of them are kept apart
        (257, 1, (1.0, 1.0, 129)),  # the first half is not any more
        (700, 512, (1.0, 1.0, 188)),
        (700, 513, (1 + 1 / 188, 2.0, 188)),
    ],
)
def test_the_last_dispatches_are_kept_apart_and_all_are_counted(
    number: int, uneven: int, expected: tuple[float, float, int]
) -> None:
    total = number * (number + 1) // 2
    even = total - uneven * (uneven + 1) // 2
    for ((tokens, found),) in run_ranks(2, many_dispatches, number, uneven):
        assert tokens == [total, 0, even, 0]
        assert (found.mean, found.largest, found.dispatches) == (pytest.approx(expected[0]), *expected[1:])


def test_counts_by_dispatch() -> None:
    layer = expert_load.ExpertLoad(None, 2)
    for _ in range(2):
        for n in range(3):
            add_on_device(layer, torch.tensor([n, 1]))
        assert layer.take_by_dispatch(3, torch.device("cpu")).tolist() == [[0, 1], [1, 1], [2, 1]]
    assert layer.take().tolist() == [0, 0]


def test_local_counts_need_no_other_rank() -> None:
    layer = expert_load.ExpertLoad(None, 2)
    layer.add(torch.tensor([1, 2]))
    assert expert_load.local_expert_load()[-1].tolist() == [1, 2]
    assert expert_load.local_expert_load()[-1].tolist() == [0, 0]
    number = len(expert_load.local_expert_load())
    del layer
    gc.collect()
    assert len(expert_load.local_expert_load()) == number - 1


@isolated
def disagree(group: Any) -> str:
    layers = [expert_load.ExpertLoad(group, 2) for _ in range(1 + group.rank())]
    layers[0].add(torch.tensor([1, 2]))
    # What only rank 1 has was not used: a model that was given up, and not yet found by Python's collector.
    assert [each.tolist() for each in expert_load.expert_load()] == [[1, 2, 1, 2], [0] * 4][: len(layers)]
    for layer in layers:
        layer.add(torch.tensor([1, 2]))
    try:
        expert_load.expert_load()
    except GroupMismatchError as error:
        return f"{len(layers)} {error}"
    return "nothing was raised"


def test_ranks_with_other_layers_get_an_error() -> None:
    assert all("by rank: [1, 2]" in said for said in run_ranks(2, disagree, fresh=True))


@isolated
def read_on_one_rank(group: Any) -> list[list[int]]:
    """Rank 0 looks at its own counts first; and rank 1 still has a layer of a model that was given up unread."""
    layer = expert_load.ExpertLoad(group, 2)
    if group.rank() == 1:
        given_up = expert_load.ExpertLoad(group, 2)
        given_up.add(torch.tensor([5, 5]))
        given_up.cycle = given_up  # type: ignore[attr-defined]
        del given_up
    layer.add(torch.tensor([1, 2]))
    local = expert_load.local_expert_load()[0].tolist() if group.rank() == 0 else []
    return [local, *(each.tolist() for each in expert_load.expert_load())]


def test_a_rank_that_has_read_its_own_counts_takes_part() -> None:
    assert run_ranks(2, read_on_one_rank, fresh=True) == [[[1, 2], [0, 0, 1, 2]], [[], [0, 0, 1, 2]]]


@isolated
def exact_counts(group: Any) -> tuple[list[int], list[int]]:
    """What the handle tells in a padded layout, and what was sent."""
    batch = make_batch(SMALL, group.rank())
    x = batch.x.float()
    handle = fused_dispatch(
        x, batch.topk_idx, batch.topk_weights, SMALL.experts, group, do_expand=True, expert_alignment=16
    )[4]
    sent = torch.bincount(batch.topk_idx[batch.topk_idx >= 0], minlength=SMALL.experts)
    torch.distributed.all_reduce(sent)
    mine = sent.view(group.size(), -1)[group.rank()]
    return handle.num_unaligned_recv_tokens_per_expert.tolist(), mine.tolist()


def test_padding_is_not_counted() -> None:
    for counted, sent in run_ranks(2, exact_counts):
        assert counted == sent


def test_counts_begun_in_inference_mode_go_on_in_training() -> None:
    """A rollout may be the first to dispatch. Counts on another device than the CPU begin with the first ones."""
    layer = expert_load.ExpertLoad(None, 2)
    with torch.inference_mode():
        layer.add(torch.empty(2, dtype=torch.int32, device="meta"))
    layer.add(torch.empty(2, dtype=torch.int32, device="meta"))  # an inference tensor could not be written to
    load = layer.load_on(torch.device("meta"))
    assert load is not None and load.is_meta and not load.is_inference()


@isolated
def sync_free_loads(group: Any) -> dict[str, tuple[list[int], list[int]]]:
    """What each way of a forward counts, and what was sent to this rank."""
    batch, found = make_batch(SMALL, group.rank()), {}
    sent = torch.bincount(batch.topk_idx[batch.topk_idx >= 0], minlength=SMALL.experts)
    torch.distributed.all_reduce(sent)
    mine = sent.view(group.size(), -1)[group.rank()].tolist()
    layer = expert_load.ExpertLoad(group, SMALL.experts // group.size())

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows, _, _, handle = sync_free_dispatch(
            *(x, batch.topk_idx, batch.topk_weights, SMALL.experts, group), load_on=layer.load_on
        )
        return sync_free_combine(rows, group, handle)

    for name, percent in (("training", 0), ("checkpointed", 0), ("evaluation", 1)):
        settings.activate(settings.resolve(sync_free_rows_percent=percent, num_max_tokens_per_rank=64))
        pool.destroy_buffers()
        x = batch.x.float().requires_grad_()
        if name == "checkpointed":
            checkpoint(recompute.Replayed(forward), x, use_reentrant=False).sum().backward()
        else:
            with torch.set_grad_enabled(name == "training"):
                forward(x)
        found[name] = layer.take().tolist(), mine
    return found


def test_sync_free_forwards_are_counted_once_however_little_room_there_is() -> None:
    for found in run_ranks(2, sync_free_loads):
        for name, (counted, sent) in found.items():
            assert counted == sent and sum(sent), name
