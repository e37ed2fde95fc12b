"""Deterministic mode on deep_ep's buffer: the same bits in repeats, after restarts and in both layouts.

What the mode changes is the order of received rows, and so everything that is added up over them: weight gradients.
A token's own sums run in the order of its selections in any case, so its output and gradients repeat without the mode,
too; that they are the same in both layouts is what this package adds, by sorting the selections.
"""

from __future__ import annotations

from typing import Any

from megatron_ep_v2.gpus import gpu_ranks
from tests.helpers.deterministic_rounds import repeat
from tests.helpers.harness import run_ranks
from tests.helpers.progress import say
from tests.helpers.shapes import GPU

RANKS = gpu_ranks()
REPEATS, RESTARTS = 10, 2


def run(deterministic: bool, repeats: int, torchs_mode: bool = False, fresh: bool = False) -> list[Any]:
    say(f"deterministic {deterministic}, {repeats} repeats, torch's mode {torchs_mode}")
    arguments = (GPU, deterministic, repeats, torchs_mode)
    return run_ranks(RANKS, repeat, *arguments, backend="nccl", fresh=fresh)


def test_the_same_bits_every_time() -> None:
    first = run(True, REPEATS)
    for restart in range(RESTARTS):
        for rank, found in enumerate(run(True, 1, fresh=True)):
            for expand, by_name in found.items():
                for name, (fingerprint,) in by_name.items():
                    where = f"rank {rank}, expanded={expand}, {name}"
                    assert set(first[rank][expand][name]) == {first[rank][False][name][0]}, f"{where}: repeats"
                    assert fingerprint == first[rank][False][name][0], f"{where}: restart {restart}"


def test_torchs_own_mode_changes_nothing() -> None:
    """With its fill of uninitialised memory on, as it is by default: deep_ep would assert."""
    for with_it, without in zip(run(True, 1, torchs_mode=True), run(True, 1), strict=True):
        for expand in (False, True):
            for name in ("rows", "output", "grad_x", "grad_probs"):
                assert with_it[expand][name] == without[expand][name]


def test_without_it_rows_come_in_another_order() -> None:
    """The negative control. Warps of many SMs race for the slots of thousands of rows: no ten orders are equal."""
    for rank, found in enumerate(run(False, REPEATS)):
        different = {name: len(set(found[True][name])) for name in found[True]}
        print(f"rank {rank}: different results in {REPEATS} repeats, expanded: {different}")
        assert different["rows"] > 1 and different["weight grad"] > 1
