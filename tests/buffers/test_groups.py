"""Process groups that forward to another, as RL trainers that offload make them; and groups made again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import megatron_ep_v2
from megatron_ep_v2 import device_checks, settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import ClosedError, LayoutOverflowError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.megatron import expert_load
from megatron_ep_v2.recompute import Replayed
from megatron_ep_v2.watchdog.stragglers import stragglers
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.reports import Report, assert_report, attempt

EXPERTS, TOKENS, HIDDEN = 4, 5, 16
WATCHED = {"MCORE_DEEPEP_V2_WATCHDOG_SECS": "30"}


class Forwarding(dist.ProcessGroup):
    """Rank, size and what the base class lacks are the inner group's; `group_name` and the store are not."""

    def __init__(self, inner: Any):
        super().__init__(inner.rank(), inner.size())
        self.inner = inner

    def rank(self) -> int:
        return self.inner.rank()

    def size(self) -> int:
        return self.inner.size()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class ForwardingMore(Forwarding):
    @property
    def group_name(self) -> str:
        return self.inner.group_name

    def get_group_store(self) -> Any:
        return self.inner.get_group_store()


def layer(group: Any, tokens: int = TOKENS) -> float:
    """Each token goes to experts 0 and 3, which pass rows through: the largest error of y = 2 x and of its gradient."""
    x = torch.randn(tokens, HIDDEN, requires_grad=True)
    topk_idx = torch.tensor([[0, 3]]).expand(tokens, -1).contiguous()
    rows, _, _, _, handle = fused_dispatch(x, topk_idx, torch.ones(tokens, 2), EXPERTS, group, do_expand=True)
    y = fused_combine(rows, group, handle)[0]
    y.sum().backward()
    return float(torch.maximum((y - 2 * x).abs().max(), (x.grad - 2).abs().max()))


def watchers() -> list[Any]:
    """The lines to the watchers of all buffers; one whose watcher was ended has no process."""
    return [buffer.watch.client for buffer in pool.buffers()]  # type: ignore[attr-defined]


@contextlib.contextmanager
def unwrapping_functions(used: bool) -> Iterator[None]:
    """Functions of torch.distributed that take a group which forwards, as the trainers replace them."""

    def unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(value: Any) -> Any:
            return value.inner if isinstance(value, Forwarding) else value

        return lambda *args, **named: function(*map(inner, args), **{name: inner(named[name]) for name in named})

    names = ("all_to_all_single", "all_gather_object", "all_reduce", "get_process_group_ranks", "get_rank")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in names if used else ():
            monkeypatch.setattr(dist, name, unwrapped(getattr(dist, name)))
        yield


def offload_and_reload(kind: type[Forwarding], destroy: Callable[[Any], None], rank: int) -> dict[str, Any]:
    """What comes of a group that is offloaded and reloaded. destroy: Destroys the inner one."""
    wrapper = kind(dist.new_group())
    found: dict[str, Any] = {"first": layer(wrapper), "same": pool.find(wrapper) is pool.find(wrapper.inner)}
    counted = expert_load.ExpertLoad(wrapper, EXPERTS // 2)
    counted.add(torch.full((EXPERTS // 2,), 1 + rank))
    found["load"] = [each.tolist() for each in expert_load.expert_load()]
    found["dispatches"] = stragglers(wrapper).dispatches
    layer(wrapper, 2 * TOKENS)  # the capacity grows
    watcher = watchers()[0]
    destroy(wrapper.inner)
    found["left"] = len(pool.buffers())
    wrapper.inner = None
    found["offloaded"] = attempt(lambda: layer(wrapper))
    wrapper.inner = dist.new_group()
    found |= {"reloaded": layer(wrapper), "ended": watcher.process is None, "buffers": len(pool.buffers())}
    found["capacity"] = pool.buffers()[0].num_max_tokens_per_rank
    pool.destroy_buffers(wrapper)
    return found | {"at last": len(pool.buffers())}


@isolated
def offload(group: Any) -> list[tuple[str, dict[str, Any]]]:
    """For each class, with the functions of torch.distributed as they are and as a trainer replaces them; and where the
    trainer keeps a `destroy_process_group` of before install(), which we do not see."""
    unseen = dist.destroy_process_group
    megatron_ep_v2.install(buffer="reference")
    try:
        outcomes = []
        for kind in (Forwarding, ForwardingMore):
            for patched in (False, True):
                with unwrapping_functions(patched):
                    outcomes.append(("seen", offload_and_reload(kind, dist.destroy_process_group, group.rank())))
        return [*outcomes, ("unseen", offload_and_reload(Forwarding, unseen, group.rank()))]
    finally:
        megatron_ep_v2.uninstall()


@pytest.mark.slow
def test_a_group_that_forwards_is_offloaded_and_reloaded() -> None:
    for outcomes in run_ranks(2, offload, env=WATCHED):
        for way, found in outcomes:
            assert found["first"] == found["reloaded"] == 0
            assert found["same"] and found["load"] == [[1, 1, 2, 2]] and found["dispatches"] == 1
            assert found["left"] == (way == "unseen"), "its buffer goes with the inner group"
            assert_report(found["offloaded"], ClosedError, "Forwarding", "inner", "reload the groups")
            assert found["ended"] and found["buffers"] == 1, "the buffer of before goes at the latest with the next one"
            assert found["capacity"] >= 2 * TOKENS, "a reloaded group does not grow from the start again"
            assert found["at last"] == 0


@isolated
def renew(group: Any) -> list[tuple[float, int, int, bool]]:
    """Groups of three rounds, each destroyed without our hook: error, buffers, watchers that run, whether one look-up
    finds the buffer."""
    settings.activate(settings.resolve(buffer="reference"))
    rounds, lines = [], []
    for _ in range(3):
        own = dist.new_group()
        error = layer(own)
        lines += watchers()
        running = sum(line.process is not None for line in dict.fromkeys(lines))
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(pool, "find_registered", lambda group: pytest.fail("asked"), raising=False)
            found = pool.find(own) is pool.buffers()[-1]
        rounds.append((error, len(pool.buffers()), running, found))
        dist.destroy_process_group(own)
    return rounds


def test_groups_made_again_and_again_leave_no_buffer_and_no_watcher() -> None:
    assert run_ranks(2, renew, env=WATCHED) == [[(0.0, 1, 1, True)] * 3] * 2


@isolated
def pass_groups_that_lead_nowhere(group: Any) -> list[Report | None]:
    settings.activate(settings.resolve(buffer="reference"))
    destroyed, two = Forwarding(dist.new_group()), Forwarding(dist.new_group())
    dist.destroy_process_group(destroyed.inner)
    two.other = group
    none = dist.ProcessGroup.__new__(type("Unrelated", (dist.ProcessGroup,), {}))
    dist.ProcessGroup.__init__(none, group.rank(), group.size())
    return [attempt(lambda wrapper=wrapper: layer(wrapper)) for wrapper in (destroyed, two, none)]


def test_a_group_that_leads_to_none_or_two_says_so() -> None:
    for destroyed, two, none in run_ranks(2, pass_groups_that_lead_nowhere):
        assert_report(destroyed, ClosedError, "class Forwarding", "only inner holds a group, which was destroyed")
        assert_report(two, ClosedError, "class Forwarding", "2 of its attributes hold one: inner, other")
        assert_report(none, ClosedError, "class Unrelated", "none of its attributes holds a group")


@isolated
def combine_too_late(group: Any) -> tuple[Report | None, float]:
    """A handle whose buffer went before its combine: refused, and the group stays usable."""
    settings.activate(settings.resolve(buffer="reference"))
    topk_idx = torch.tensor([[0, 3]] * TOKENS)
    x = torch.randn(TOKENS, HIDDEN)
    rows, _, _, _, handle = fused_dispatch(x, topk_idx, torch.ones(TOKENS, 2), EXPERTS, group, do_expand=True)
    pool.destroy_buffers()
    return attempt(lambda: fused_combine(rows, group, handle)), layer(group)


def test_a_combine_is_refused_once_the_buffer_of_its_dispatch_is_gone() -> None:
    for report, error in run_ranks(2, combine_too_late):
        assert_report(report, ClosedError, "was destroyed")
        assert error == 0


@isolated
def replay_too_late(group: Any) -> tuple[Report | None, int]:
    """A checkpoint whose buffer went before its backward, where the group has a new one by then: what is said, and how
    often the new one was asked to dispatch."""
    settings.activate(settings.resolve(buffer="reference"))
    topk_idx = torch.tensor([[0, 3]] * TOKENS)

    def run(x: torch.Tensor) -> torch.Tensor:
        rows, _, _, _, handle = fused_dispatch(x, topk_idx, torch.ones(TOKENS, 2), EXPERTS, group, do_expand=True)
        return fused_combine(rows, group, handle)[0]

    y = checkpoint(Replayed(run), torch.randn(TOKENS, HIDDEN, requires_grad=True), use_reentrant=False)
    pool.destroy_buffers()
    layer(group)
    with mock.patch.object(pool.find(group), "dispatch") as dispatch:
        return attempt(lambda: y.sum().backward()), dispatch.call_count


def test_a_replay_is_refused_once_the_buffer_of_its_first_dispatch_is_gone() -> None:
    for report, dispatches in run_ranks(2, replay_too_late):
        assert_report(report, ClosedError, "was destroyed")
        assert dispatches == 0


@isolated
def decide_over_groups_that_forward(group: Any) -> list[Report | None]:
    """One rank has an error; with the functions of torch.distributed as they are, and as a trainer replaces them."""
    outcomes = []
    for patched in (False, True):
        check = device_checks.DeviceCheck(
            lambda counts: LayoutOverflowError(f"full: {counts}", fix="grow"), torch.device("cpu")
        )
        check.add(torch.tensor([group.rank() == 1]))
        with unwrapping_functions(patched):
            outcomes.append(attempt(lambda: device_checks.read_all(Forwarding(group))))
    return outcomes


def test_ranks_decide_over_groups_that_forward() -> None:
    others, own = run_ranks(2, decide_over_groups_that_forward)
    for report in others:
        assert_report(report, LayoutOverflowError, "another expert-parallel group")
    for report in own:
        assert_report(report, LayoutOverflowError, "full: {0: 1}")
