"""The helper that finds memory which is handed out too early: one case of each kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.helpers.stream_memory import StreamMemory, streams_on_the_cpu

Case = Callable[[torch.Tensor, torch.cuda.Stream], object]


def used(rows: torch.Tensor, other: torch.cuda.Stream) -> None:
    with torch.cuda.stream(other):
        rows + 1


def waited_for(rows: torch.Tensor, other: torch.cuda.Stream) -> None:
    used(rows, other)
    event = torch.cuda.Event()
    event.record(other)
    event.wait(torch.cuda.current_stream())


def waited_for_too_early(rows: torch.Tensor, other: torch.cuda.Stream) -> None:
    waited_for(rows, other)
    used(rows, other)


def recorded(rows: torch.Tensor, other: torch.cuda.Stream) -> None:
    used(rows, other)
    rows.record_stream(other)


def viewed(rows: torch.Tensor, other: torch.cuda.Stream) -> None:
    with torch.cuda.stream(other):
        torch.zeros_like(rows.view(-1).detach())


def used_through_a_view(rows: torch.Tensor, other: torch.cuda.Stream) -> None:
    used(rows.view(-1)[1:], other)


def freed_by_size(rows: torch.Tensor, other: torch.cuda.Stream) -> None:
    used(rows, other)
    rows.untyped_storage().resize_(0)
    torch.cuda.current_stream().wait_stream(other)


def used_in_a_backward(rows: torch.Tensor, other: torch.cuda.Stream) -> None:
    """It runs on the forward's stream, and for that one autograd waits."""
    factor = torch.ones(3, requires_grad=True)
    with torch.cuda.stream(other):
        sums = (rows * factor).sum()
    sums.backward()


@pytest.mark.parametrize("case", [waited_for, recorded, viewed, used_in_a_backward])
def test_no_hazard(case: Case) -> None:
    assert run(case) == []


@pytest.mark.parametrize("case", [used, waited_for_too_early, used_through_a_view, freed_by_size])
def test_a_hazard(case: Case) -> None:
    (found,) = run(case)
    assert "(2, 3) torch.float32 of ones on compute" in found
    assert "may be overwritten before add on another at tests/test_stream_memory.py:" in found


def run(case: Case) -> list[str]:
    with streams_on_the_cpu(), StreamMemory() as memory:
        other = torch.cuda.Stream()
        rows = torch.ones(2, 3)
        case(rows, other)
        assert memory.others == [] or case is freed_by_size, "before it is freed"
        del rows
        assert memory.ours == []
        return memory.others
