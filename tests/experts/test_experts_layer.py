"""A whole MoE layer of this package's parts on the reference buffer, each way to the experts, against dense fp64."""

from __future__ import annotations

from typing import Any

from megatron_ep_v2 import settings
from tests.helpers.cases import Case
from tests.helpers.experts_layer import WAYS, errors, train_each_way
from tests.helpers.fused_layer import Step
from tests.helpers.harness import isolated, run_ranks

CASE = Case("idle expert", (40, 37), "drop some, idle expert", hidden=32, experts=8, ffn=24)


@isolated
def train(group: Any) -> dict[tuple[str, str], Step]:
    settings.activate(settings.resolve(buffer="reference"))
    return train_each_way(group, CASE, WAYS, ("grouped", "sequential"), "cpu")


def test_every_way_to_the_experts_gives_the_same_layer() -> None:
    found = errors(CASE, run_ranks(2, train))
    assert len(found) == 2 * 3 * 2 * 6
    for name, error in found.items():
        assert error < 2e-6, f"{name}: relative L2 {error:.1e}"
