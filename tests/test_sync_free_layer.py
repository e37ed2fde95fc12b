"""Dispatch and combine without a host wait: against the dense fp64 oracle, with poisoned tails, with little room."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_ep_v2 import recompute, settings, sync_free
from megatron_ep_v2.device_checks import read_all
from megatron_ep_v2.errors import InputError, LayoutOverflowError
from megatron_ep_v2.recompute import Replayed
from megatron_ep_v2.sync_free import sync_free_combine, sync_free_dispatch
from tests.helpers import fused_layer
from tests.helpers.cases import EXPANDED, Case, edge_cases, make_batch
from tests.helpers.compare import relative_error
from tests.helpers.dense_oracle import Experts
from tests.helpers.fused_layer import Step, assert_step, step_of
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.shapes import Split


def run_experts(rows: torch.Tensor, probs: torch.Tensor, counts: torch.Tensor, experts: Experts) -> torch.Tensor:
    """As a grouped GEMM does it: padding between experts runs along, rows after the last expert stay unwritten."""
    assert not rows.isnan().any() and not probs.isnan().any(), "a row that no rank sent has reached the experts"
    end = int(counts.sum())
    weighted = [experts.run(expert, mine) for expert, mine in enumerate(rows[:end].split(counts.tolist()))]
    done = torch.cat(weighted) * probs[:end, None]
    return torch.cat([done, torch.full_like(rows[end:], float("nan"))]).to(rows.dtype)


def train_step(case: Case, group: Any, align: int, checkpointed: bool = False) -> Step:
    def layer(x: torch.Tensor, topk_idx: torch.Tensor, probs: torch.Tensor, experts: Experts) -> torch.Tensor:
        given = (x, topk_idx, probs, case.experts, group)
        rows, row_probs, counts, handle = sync_free_dispatch(*given, expert_alignment=align)
        return sync_free_combine(run_experts(rows, row_probs, counts, experts), group, handle)

    def recomputed(*arguments: Any) -> torch.Tensor:
        return checkpoint(Replayed(layer), *arguments, use_reentrant=False)

    return step_of(recomputed if checkpointed else layer, case, group.rank())


@isolated
def train_steps(group: Any, case: Case) -> dict[int, Step]:
    settings.activate(settings.resolve(sync_free_rows_percent=0))  # room for whatever arrives
    steps = {align: train_step(case, group, align) for align in (1, 16)}
    read_all()
    return steps


@functools.cache
def steps(case: Case) -> list[dict[int, Step]]:
    return run_ranks(case.size, train_steps, case)


@pytest.mark.slow
@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("case", [*edge_cases(2), *edge_cases(4)], ids=str)
def test_outputs_and_gradients_in_fp64(case: Case, align: int) -> None:
    exact = replace(case, dtype=torch.float64)
    for rank, by_align in enumerate(steps(exact)):
        assert_step(exact, rank, by_align[align])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    case = replace(edge_cases(4)[1], dtype=dtype)
    for rank, by_align in enumerate(steps(case)):
        assert_step(case, rank, by_align[16])


SKEWED = Case("skewed", (6, 4, 7, 5), "all to one rank", experts=16, topk=3)  # the last rank gets all of it


@isolated
def overflow_and_replay(group: Any) -> tuple[str, list[int], bool, Step]:
    """(the error, the room after growing, whether the weight is untouched, the replayed step)."""
    settings.activate(settings.resolve(sync_free_rows_percent=50, num_max_tokens_per_rank=8))
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer.step()  # nothing was dispatched yet, so nothing holds it
    changed = weight.detach().clone()

    train_step(SKEWED, group, 1)
    with pytest.raises(LayoutOverflowError) as caught:
        optimizer.step()
    untouched = torch.equal(weight, changed)
    assert caught.value.fix
    grown = sync_free.grow()
    replayed = train_step(SKEWED, group, 1)
    optimizer.step()
    assert not torch.equal(weight, changed)
    assert sync_free.grow() == []
    return str(caught.value), grown, untouched, replayed


def test_too_little_room_is_noticed_on_every_rank_and_the_step_replayed() -> None:
    answers = run_ranks(4, overflow_and_replay)
    errors = {error for error, _, _, _ in answers}
    assert len(errors) == 1, "all ranks must say the same"
    (error,) = errors
    assert "rank 3 was sent more rows" in error and "too many on ranks [3]" in error
    assert "12 slots (50 % of an even share)" in error  # 50 % of 8 tokens x top-3
    for rank, (_, grown, untouched, replayed) in enumerate(answers):
        assert untouched, "the optimizer stepped although selections were left out"
        assert grown == answers[0][1] and grown[0] > 50
        assert_step(SKEWED, rank, replayed)


FEW, MORE = SKEWED, Case("more rows than before", (8, 8, 8, 8), experts=16, topk=3)


@isolated
def fitted(group: Any) -> tuple[list[list[int]], list[int], list[int], list[Step], str]:
    """(what each `fit` returned, slots of each step, rows that this rank received in it, the results of each step, the
    error of the one that found too few slots)."""
    settings.activate(settings.resolve(sync_free_rows_percent=0, num_max_tokens_per_rank=8))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    slots: list[int] = []
    received: list[int] = []
    results: list[Step] = []

    def step(case: Case) -> None:
        batch = make_batch(case, group.rank())
        rows, _, counts, _ = sync_free_dispatch(batch.x, batch.topk_idx, batch.topk_weights, case.experts, group)
        slots.append(len(rows))
        received.append(int(counts.sum()))
        results.append(train_step(case, group, 1))

    rooms = [sync_free.fit()]  # nothing has arrived
    step(FEW)
    rooms.append(sync_free.fit())  # nor been read
    optimizer.step()
    rooms.append(sync_free.fit(margin_percent=0))
    step(FEW)
    optimizer.step()
    assert sync_free.grow() == []
    rooms.append(sync_free.fit())
    step(MORE)
    with pytest.raises(LayoutOverflowError) as caught:
        optimizer.step()
    sync_free.grow()
    step(MORE)
    optimizer.step()
    rooms.append(sync_free.fit(0))
    step(FEW)
    optimizer.step()
    rooms.append(sync_free.fit(0))
    assert sync_free.grow() == []  # what an earlier step needed is over
    with pytest.raises(InputError, match="margin_percent=-1"):
        sync_free.fit(-1)
    return rooms, slots, received, results, str(caught.value)


def test_room_that_fits_what_has_arrived() -> None:
    answers = run_ranks(4, fitted)
    received = [max(rows) for rows in zip(*(received for _, _, received, _, _ in answers), strict=True)]
    few, more = received[0], received[3]
    assert few * 5 // 4 < more, "the test needs a step that overflows"
    quarter_more = -(-few * 5 // 4)
    percents = [-(-100 * slots // (8 * 3)) for slots in (few, quarter_more, more)]  # an even share: 8 tokens x top-3
    for rank, (rooms, slots, _, results, error) in enumerate(answers):
        assert rooms == [[], [], percents[:1], percents[1:2], percents[2:], percents[:1]]
        assert slots[:3] == [4 * 8 * 3, few, quarter_more] and slots[3] >= more
        assert "was sent more rows in this step" in error
        assert torch.equal(results[0].output, results[1].output) and torch.equal(results[0].grad_x, results[1].grad_x)
        assert_step(MORE, rank, results[3])


@isolated
def dropped(group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """With too little room: output and gradient of x, which miss what was left out but nothing else."""
    settings.activate(settings.resolve(sync_free_rows_percent=50, num_max_tokens_per_rank=8))
    step = train_step(SKEWED, group, 1)
    with pytest.raises(LayoutOverflowError):
        read_all()
    return step.output, step.grad_x


def test_selections_without_a_slot_leave_no_garbage() -> None:
    for output, grad in run_ranks(4, dropped):
        assert output.isfinite().all() and grad.isfinite().all()


@isolated
def rooms(group: Any) -> list[int]:
    """Slots at 0, 100 and 100,000 percent."""
    found = []
    for percent in (0, 100, 100_000):
        settings.activate(settings.resolve(sync_free_rows_percent=percent, num_max_tokens_per_rank=10))
        batch = make_batch(SKEWED, group.rank())
        rows, *_ = sync_free_dispatch(batch.x, batch.topk_idx, batch.topk_weights, SKEWED.experts, group)
        found.append(len(rows))
        sync_free.pool.destroy_buffers()
    return found


def test_room_is_a_share_of_what_could_arrive() -> None:
    assert run_ranks(4, rooms) == [[4 * 10 * 3, 10 * 3, 4 * 10 * 3]] * 4


TWO_SKEWED = Case("two skewed", (6, 4), "all to one rank", experts=16, topk=3)
TWO_SMALL = Case("two small", (2, 2), experts=16, topk=3)  # 12 selections fit wherever they go


@isolated
def two_groups(world: Any) -> tuple[int, Case, int, Step]:
    """The loop of docs/sync_free.md for several groups: the steps it took, and the last one."""
    settings.activate(settings.resolve(sync_free_rows_percent=50, num_max_tokens_per_rank=8))
    group = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])][world.rank() // 2]
    case = (TWO_SKEWED, TWO_SMALL)[world.rank() // 2]
    steps_taken, again = 0, True
    while again and steps_taken < 3:
        steps_taken += 1
        step = train_step(case, group, 1)
        try:
            read_all(world)
            again = False
        except LayoutOverflowError:
            sync_free.grow()
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).step()  # has nothing left to read
    return steps_taken, case, group.rank(), step


def test_several_groups_repeat_a_step_together() -> None:
    for attempts, case, rank, step in run_ranks(4, two_groups):
        assert attempts == 2
        assert_step(case, rank, step)


WIDE = Case("wide", (6, 4, 7, 5), "drop some selections", experts=16, topk=3, hidden=256)


@isolated
def in_8_bits(group: Any) -> tuple[Step, Step]:
    """The same 8-bit rows, sync-free and expanded."""
    settings.activate(settings.resolve(dispatch_dtype="fp8", grad_dispatch_dtype="fp8", sync_free_rows_percent=0))
    return train_step(WIDE, group, 1), fused_layer.train_step(WIDE, EXPANDED, group)


def test_rows_and_gradients_in_8_bits() -> None:
    for rank, (ours, theirs) in enumerate(run_ranks(4, in_8_bits)):
        for name in ("output", "grad_x", "grad_probs"):
            error = relative_error(getattr(ours, name), getattr(theirs, name))
            assert error < 1e-6, f"rank {rank}, {name}: relative L2 {error:.1e}"
        with pytest.raises(AssertionError, match="relative L2 error"):  # it was in 8 bits
            assert_step(WIDE, rank, ours)


@isolated
def recomputed(group: Any) -> tuple[Step, list[bool]]:
    """A checkpointed layer, and for each dispatch whether it replayed a handle."""
    settings.activate(settings.resolve(sync_free_rows_percent=0))
    replayed: list[bool] = []
    original = recompute.take

    def take() -> Any:
        handle = original()
        replayed.append(handle is not None)
        return handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "take", take)
        step = train_step(SKEWED, group, 16, checkpointed=True)
    read_all()
    return step, replayed


def test_a_recomputed_layer_replays_its_handle() -> None:
    for rank, (step, replayed) in enumerate(run_ranks(4, recomputed)):
        assert_step(SKEWED, rank, step)
        assert replayed == [False, True]


def flex_bodies(group: Any, split: Split) -> None:
    from tests.megatron.test_flex_dispatcher import run_bodies

    run_bodies(group, split, "sync-free")


@pytest.mark.slow
@pytest.mark.parametrize("split", [Split(1, 2), Split(1, 4), Split(2, 2)], ids=str)
def test_under_megatrons_flex_dispatcher(split: Split) -> None:
    run_ranks(split.size, flex_bodies, split)
