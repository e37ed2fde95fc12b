"""Launches of Triton kernels: compiled once for what decides, and for nothing else. With a stand-in for Triton."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.interpreter import needs_triton

GRID = (3, 1, 1)
# As torch.zeros(64), on a device that is neither the CPU (-1) nor asks for a GPU.
ELSEWHERE = SimpleNamespace(get_device=lambda: -2, dtype=torch.float32, data_ptr=lambda: 0)

pytestmark = needs_triton


class Compiled:
    """Takes what Triton's takes from 3.3 on: all of the kernel's parameters, and nothing by name."""

    def __init__(self, number: int):
        self.number, self.launched = number, list[tuple[Any, ...]]()

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            assert len(arguments) == self.number
            self.launched.append((grid, *arguments))

        return run


class Kernel:
    """What `triton.jit` makes of a function, as far as a launch goes. specialized: its numbers are."""

    def __init__(self, number: int, specialized: bool = False):
        self.params = [SimpleNamespace(name=f"p{i}", do_not_specialize=not specialized) for i in range(number)]
        self.compiled: list[tuple[dict[str, Any], Compiled]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
        def run(*arguments: Any, **options: Any) -> Compiled:
            assert len(arguments) == len(self.params)
            self.compiled.append((options, Compiled(len(self.params))))
            return self.compiled[-1][1]

        return run


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    from megatron_ep_v2.kernels import launch as module

    monkeypatch.setattr(module, "_compiled", {})
    return module.launch


def test_a_second_launch_uses_what_was_compiled(launch: Callable[..., None]) -> None:
    kernel, x = Kernel(4), torch.zeros(64)
    launch(kernel, GRID, (x,), (5,), (True, 8), num_warps=2)
    launch(kernel, (7, 1, 1), (x,), (6,), (True, 8), num_warps=2)
    ((options, compiled),) = kernel.compiled
    assert options == {"num_warps": 2}
    assert compiled.launched == [((7, 1, 1), x, 6, True, 8)]


@pytest.mark.parametrize(
    ("x", "constants", "options"),
    [
        (torch.zeros(64).bfloat16(), (8,), {"num_warps": 2}),
        (torch.zeros(64)[1:], (8,), {"num_warps": 2}),  # not at a multiple of 16 bytes
        (ELSEWHERE, (8,), {"num_warps": 2}),
        (torch.zeros(64), (16,), {"num_warps": 2}),
        (torch.zeros(64), (8,), {"num_warps": 4}),
        (torch.zeros(64), (8,), {"num_stages": 2}),
    ],
    ids=["dtype", "alignment", "device", "constant", "option", "another option"],
)
def test_what_decides_is_compiled_for(
    launch: Callable[..., None], x: Any, constants: tuple[Any, ...], options: dict[str, int]
) -> None:
    kernel = Kernel(2)
    launch(kernel, GRID, (torch.zeros(64),), constants=(8,), num_warps=2)
    launch(kernel, GRID, (x,), constants=constants, **options)
    assert len(kernel.compiled) == 2


def test_another_kernel_is_not_taken_for_it(launch: Callable[..., None]) -> None:
    one, other = Kernel(1), Kernel(1)
    launch(one, GRID, (torch.zeros(64),))
    launch(other, GRID, (torch.zeros(64),))
    assert len(one.compiled) == len(other.compiled) == 1


def test_a_kernel_that_is_compiled_for_its_first_number_is_refused(launch: Callable[..., None]) -> None:
    with pytest.raises(AssertionError, match="p1 would be compiled for its first value"):
        launch(Kernel(3, specialized=True), GRID, (torch.zeros(64),), (16,), (8,))
