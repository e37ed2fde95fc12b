"""Megatron's whole MoE layer on the reference buffer, both layouts, feature by feature against Megatron's alltoall."""

from __future__ import annotations

import pytest

from tests.helpers.harness import run_ranks
from tests.helpers.moe_features import FEATURES, compare_with_alltoall
from tests.helpers.shapes import CPU


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_the_layer_agrees_with_alltoall(feature: str) -> None:
    answers = run_ranks(2, compare_with_alltoall, CPU, {feature: FEATURES[feature]}, ("compact", "expanded"))
    for rank, errors in enumerate(answers):
        for case, by_tensor in errors.items():
            for name, error in by_tensor.items():
                assert error < 2e-6, f"rank {rank}, {case}, {name}: relative L2 {error:.1e}"
