"""Launches of Triton kernels: compiled once for what decides, and for nothing else. With a stand-in for Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ep_v2.kernels import launch as module
from megatron_ep_v2.kernels.launch import launch

GRID = (3, 1, 1)


class Compiled:
    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.launched.append((grid, *arguments))


class Kernel:
    """What `triton.jit` makes of a function, as far as a launch goes."""

    def __init__(self) -> None:
        self.compiled: list[tuple[dict[str, Any], Compiled]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
        def run(*arguments: Any, **options: Any) -> Compiled:
            self.compiled.append((options, Compiled()))
            return self.compiled[-1][1]

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


def test_a_second_launch_uses_what_was_compiled(kernel: Kernel) -> None:
    x = torch.zeros(64)
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
        (torch.zeros(64), (16,), {"num_warps": 2}),
        (torch.zeros(64), (8,), {"num_warps": 4}),
        (torch.zeros(64), (8,), {"num_stages": 2}),
    ],
    ids=["dtype", "alignment", "constant", "option", "another option"],
)
def test_what_decides_is_compiled_for(
    kernel: Kernel, x: torch.Tensor, constants: tuple[Any, ...], options: dict[str, int]
) -> None:
    launch(kernel, GRID, (torch.zeros(64),), constants=(8,), num_warps=2)
    launch(kernel, GRID, (x,), constants=constants, **options)
    assert len(kernel.compiled) == 2


def test_other_kernels_are_told_apart(kernel: Kernel) -> None:
    other = Kernel()
    launch(kernel, GRID, (torch.zeros(64),))
    launch(other, GRID, (torch.zeros(64),))
    assert len(kernel.compiled) == len(other.compiled) == 1
