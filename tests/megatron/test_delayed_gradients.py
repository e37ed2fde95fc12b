"""Weight gradients that a backward leaves for `backward_dw()`: what becomes of them where that is not called."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.megatron.experts import Experts
from megatron_ep_v2.megatron.stacked_linear import drop_delayed
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.megatron_names import clean
from tests.helpers.megatron_training import Job, Setup, on_cpu
from tests.helpers.reports import assert_report, attempt
from tests.helpers.shapes import Split
from tests.megatron.test_experts_install import in_this_process
from tests.megatron.test_experts_refused import experts
from tests.megatron.test_experts_training import delay

__all__ = ["clean"]  # a fixture


def given_up(ours: Any, factor: float) -> weakref.ref[torch.Tensor]:
    """A backward without `backward_dw()`; what its weight gradients keep."""
    rows = (factor * torch.ones(3, 64)).requires_grad_()
    ours(rows, torch.tensor([1, 0, 2, 0]), torch.ones(3))[0].sum().backward()
    assert ours.linear_fc1.weight.grad is None and rows.grad is not None
    return weakref.ref(rows)


def gradients(ours: Any, factor: float) -> list[torch.Tensor]:
    given_up(ours, factor)
    ours.backward_dw()
    found = [ours.linear_fc1.weight.grad, ours.linear_fc2.weight.grad]
    ours.zero_grad()
    return found


@in_this_process
def test_gradients_of_a_step_that_was_given_up_are_dropped_for_good() -> None:
    ours = experts({"delay_wgrad_compute": True})
    wanted = gradients(ours, 2.0)
    kept = given_up(ours, 1.0)
    other = experts({"delay_wgrad_compute": True})
    drop_delayed(other)
    assert kept() is not None, "another model's"
    drop_delayed(torch.nn.Sequential(ours))
    gc.collect()
    assert kept() is None
    assert all(map(torch.equal, gradients(ours, 2.0), wanted))


@in_this_process
def test_an_evaluation_does_not_mind_them() -> None:
    ours = experts({"delay_wgrad_compute": True})
    given_up(ours, 1.0)
    with torch.no_grad():
        output, _ = ours(torch.ones(3, 64), torch.tensor([1, 0, 2, 0]), torch.ones(3))
    assert output.shape == (3, 64)
    ours.backward_dw()
    assert ours.linear_fc1.weight.grad.norm() > 0


@in_this_process
def test_no_optimizer_steps_without_them() -> None:
    """A loop that never calls backward_dw() would take its first step without the experts' gradients."""
    ours = experts({"delay_wgrad_compute": True})
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    before = ours.linear_fc1.weight.detach().clone()
    given_up(ours, 1.0)
    report = attempt(optimizer.step)
    assert_report(report, SettingsError, "backward_dw()", "before an optimizer's step", "drop_delayed(model)")
    assert torch.equal(ours.linear_fc1.weight, before)
    ours.backward_dw()
    optimizer.step()
    assert not torch.equal(ours.linear_fc1.weight, before)


class OutOfMemory(RuntimeError):
    """What a test raises between a backward and its weight gradients, or in these."""


@in_this_process
def test_no_optimizer_steps_after_an_error_among_them() -> None:
    """The last one's is missing."""
    ours = experts({"delay_wgrad_compute": True})
    wanted = gradients(ours, 2.0)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)

    def fail(_: torch.Tensor) -> None:
        raise OutOfMemory

    given_up(ours, 1.0)
    hook = ours.linear_fc1.weight.register_hook(fail)
    with pytest.raises(OutOfMemory):
        ours.backward_dw()
    hook.remove()
    assert_report(attempt(optimizer.step), SettingsError, "before an optimizer's step")
    drop_delayed(ours)
    ours.zero_grad()
    assert all(map(torch.equal, gradients(ours, 2.0), wanted))


def fail_once(patch: pytest.MonkeyPatch) -> None:
    """The next `backward_dw` of any experts raises before it has done anything."""
    theirs: Callable[[Experts], None] = Experts.backward_dw

    def backward_dw(self: Experts) -> None:
        patch.setattr(Experts, "backward_dw", theirs)
        raise OutOfMemory

    patch.setattr(Experts, "backward_dw", backward_dw)


def skipped(group: Any) -> dict[str, bool]:
    """Whether losses, norms and weights are those of a job that never failed, by `fusion`; every rank fails in the
    second step and goes on with the same micro-batches."""
    found = {}
    with on_cpu(), process_groups(Split(1, 2)):
        for fusion in (False, True):
            results: list[Any] = []
            for fails in (False, True):
                job = Job(Setup(experts="grouped", fusion=fusion, overlap=True))
                ours = [module for module in job.model.modules() if isinstance(module, Experts)]
                with pytest.MonkeyPatch.context() as patch:
                    delay(ours, patch)
                    steps = [job.step()]
                    if fails:
                        fail_once(patch)
                        with pytest.raises(OutOfMemory):
                            job.step()
                        assert any(each.linear_fc1.delayed for each in ours)
                    steps += [job.step(), job.step()]
                results.append((steps, job.weights()))
            (wanted, theirs), (steps, weights) = results
            found[f"fusion={fusion}"] = steps == wanted and all(map(torch.equal, weights.values(), theirs.values()))
    return found


@pytest.mark.slow
def test_a_skipped_step_leaves_nothing_to_the_next_one() -> None:
    for found in run_ranks(2, skipped):
        assert found == {"fusion=False": True, "fusion=True": True}
