"""A whole MoE layer of this package's parts on the reference buffer, each way to the experts, against dense fp64."""

from __future__ import annotations

import torch

from megatron_ep_v2 import settings
from tests.helpers.experts_layer import WAYS, errors, run_layer
from tests.helpers.experts_oracle import layer, layer_expected
from tests.helpers.harness import run_ranks

SIZES = {"tokens": 40, "experts": 8, "topk": 3, "hidden": 32, "ffn": 24, "dtype": torch.float32}


def run(group, *args):  # type: ignore[no-untyped-def]
    settings.activate(settings.resolve(buffer="reference"))
    return run_layer(group, *args, "cpu")


def test_every_way_to_the_experts_gives_the_same_layer() -> None:
    wanted = layer_expected(layer(ranks=2, device="cpu", **SIZES))
    found = errors(run_ranks(2, run, WAYS, ("grouped", "sequential"), SIZES), wanted)
    assert len(found) == 2 * 3 * 2 * 5
    for name, error in found.items():
        assert error < 2e-6, f"{name}: relative L2 {error:.1e}"
