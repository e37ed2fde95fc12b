"""Checks counted on the device: when they are read, who raises, and that no weight has changed by then."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from megatron_ep_v2 import device_checks
from megatron_ep_v2.errors import EPError
from tests.helpers.harness import run_ranks

CPU = torch.device("cpu")


def make_check(name: str = "full", group: Any = None) -> device_checks.DeviceCheck:
    return device_checks.DeviceCheck(lambda counts: EPError(f"{name}: {counts}"), CPU, group)


def make_optimizer() -> tuple[torch.optim.Optimizer, torch.Tensor]:
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)
    return torch.optim.SGD([weight], lr=1.0), weight


def test_violations_add_up_and_are_raised_before_a_weight_changes() -> None:
    check = make_check()
    optimizer, weight = make_optimizer()
    check.add(torch.tensor([True, False, True]))
    check.add(torch.tensor([[1, 2], [0, 0]]))
    with pytest.raises(EPError, match=r"full: \{0: 5\}"):
        optimizer.step()
    assert weight.tolist() == [1.0] * 3
    optimizer.step()  # what was raised is forgotten
    assert weight.tolist() == [0.0] * 3


def test_nothing_counted_raises_nothing() -> None:
    check = make_check()
    check.add(torch.zeros(4, dtype=torch.bool))
    assert check.waiting
    make_optimizer()[0].step()
    assert not check.waiting


def test_a_loop_of_ones_own_reads_by_name() -> None:
    check = make_check()
    check.count += 2  # as a kernel does
    device_checks.read_all()  # not touched
    check.touch()
    with pytest.raises(EPError, match="full"):
        device_checks.read_all()
    device_checks.read_all()


def test_reset_forgets() -> None:
    check = make_check()
    check.add(torch.tensor([True]))
    check.reset()
    device_checks.read_all()


def test_several_checks_are_reported_at_once() -> None:
    first, second = make_check("first"), make_check("second")
    second.add(torch.tensor([True]))
    first.add(torch.tensor([True]))
    with pytest.raises(EPError, match="first") as caught:
        device_checks.read_all()
    assert caught.value.__notes__ == ["second: {0: 1}"]


def test_a_check_goes_with_its_owner() -> None:
    check = make_check()
    check.add(torch.tensor([True]))
    del check
    gc.collect()
    device_checks.read_all()


def violate_on_rank_one(group: Any) -> tuple[str, list[float], int]:
    """Runs in every rank: only rank 1 counts something, and only in the second of two checks."""
    gathers = 0
    gather = torch.distributed.all_gather

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal gathers
        gathers += 1
        return gather(*args, **kwargs)

    torch.distributed.all_gather = counted
    try:
        quiet, check = make_check("quiet", group), make_check("full", group)
        optimizer, weight = make_optimizer()
        for violations in (0, 3):
            quiet.add(torch.zeros(2, dtype=torch.bool))
            check.add(torch.tensor(violations * (group.rank() == 1)))
            try:
                optimizer.step()
            except EPError as error:
                return str(error), weight.tolist(), gathers
    finally:
        torch.distributed.all_gather = gather
    return "", weight.tolist(), gathers


def test_all_ranks_of_a_group_raise_together() -> None:
    """After one good step, with one collective for all checks of a step."""
    assert run_ranks(3, violate_on_rank_one) == [("full: {1: 3}", [0.0] * 3, 2)] * 3


def outlive_its_group(group: Any) -> tuple[float, str]:
    """Runs in every rank: only rank 0 steps after the group of its checks was destroyed, once well and once not."""
    once = torch.distributed.new_group([0, 1])
    quiet, full = make_check("quiet", once), make_check("full", once)
    optimizer, weight = make_optimizer()
    quiet.add(torch.tensor([False]))
    torch.distributed.destroy_process_group(once)
    if group.rank() == 0:
        optimizer.step()
        full.add(torch.tensor([True]))
        with pytest.raises(EPError, match="full") as caught:
            optimizer.step()
        return weight.sum().item(), str(caught.value)
    return weight.sum().item(), ""


def test_a_check_that_outlives_its_group_waits_for_no_rank() -> None:
    """As one does whose buffer is kept by an output of the user's."""
    assert run_ranks(2, outlive_its_group) == [(0.0, "full: {0: 1}"), (3.0, "")]


def test_a_check_made_in_inference_mode_serves_training() -> None:
    """A rollout may be the first to dispatch."""
    with torch.inference_mode():
        check = make_check()
        check.add(torch.tensor([True]))
    check.add(torch.tensor([True]))
    with pytest.raises(EPError, match=r"full: \{0: 2\}"):
        device_checks.read_all()
