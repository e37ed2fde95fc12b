"""Redundant experts on GPUs: steps in a row with changed plans, against a dense layer in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.gpus import gpu_ranks
from tests.helpers.carriers import v2_carrier
from tests.helpers.harness import run_ranks
from tests.helpers.progress import say
from tests.helpers.redundant_layer import BF16, against_dense, check_steps

RANKS = gpu_ranks()


@pytest.mark.parametrize("slots", [1, 2])
def test_steps_with_changed_plans_against_fp64(slots: int) -> None:
    if not CARRIERS[v2_carrier()].moves_experts:
        able = [carrier.requirement for carrier in CARRIERS.values() if carrier.moves_experts and carrier.is_v2]
        pytest.skip(f"{v2_carrier()} does not move redundant experts: needs {' or '.join(able)}")
    shape = replace(BF16, experts=4 * RANKS, device="cuda")
    worst = check_steps(run_ranks(RANKS, against_dense, shape, slots, backend="nccl"))
    say(f"R = {slots}: the largest relative L2 error is {worst:.1e}")
