"""Tokens that the router gives to fewer experts than its top-k: padding taken out of the routing map, experts that a
replayed routing names twice, what a capacity factor dropped. They do not travel and are not counted; outputs and all
gradients are those of Megatron's alltoall dispatcher, which goes by the routing map."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.device_checks import read_all
from tests.helpers.compare import relative_errors
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import (
    AUX_LOSS,
    CAPACITY_FACTOR,
    build_layer,
    hidden_states,
    process_groups,
    step,
    use_dispatcher,
)
from tests.helpers.moe_features import WHOLE_LAYER
from tests.helpers.shapes import CPU

TOKENS = 12
# What `kept` leaves, tokens of rank 1 if they are others, fields of the configuration.
CASES: dict[str, dict[str, Any]] = {
    "padding, uneven ranks, auxiliary loss": {"tokens": 7, "keep": "first", **AUX_LOSS},
    "a rank without an expert": {"keep": "rank 0"},
    "no rank has an expert": {"keep": "none"},
    "named twice": {"keep": "once"},
    "padding and a capacity factor": {"keep": "first", **CAPACITY_FACTOR},
    "padding, recomputed": {"keep": "first", **WHOLE_LAYER},
    "padding, deterministic": {"keep": "first", "deterministic_mode": True},
}
LAYOUTS = ("compact", "expanded", "sync-free")


def kept(routing_map: torch.Tensor, keep: str) -> torch.Tensor:
    """What is left of a routing map [T, E]."""
    tokens = torch.arange(len(routing_map))[:, None]
    if keep == "once":  # of the two experts with the lowest numbers, the lower: as where indices are 4, 4, 6
        first = routing_map & (routing_map.cumsum(1) == 1)
        return routing_map & ~(first & (tokens % 2 == 0))
    if keep == "first":
        return routing_map & (tokens < 5)
    return routing_map & torch.tensor(keep == "rank 0" and dist.get_rank() == 0)


def run_case(dispatcher: str, case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[int], list[int]]:
    """A training step, the tokens of each expert that were counted, and those of the routing maps."""
    more = dict(case)
    keep, tokens_of_rank_1 = more.pop("keep"), more.pop("tokens", TOKENS)
    layer, maps = build_layer(CPU, dispatcher, "grouped", **more), []
    if dispatcher == "alltoall":  # without a capacity factor it takes it that each token has its top-k
        layer.token_dispatcher.config = copy.copy(layer.config)
        layer.token_dispatcher.config.moe_expert_capacity_factor = 1.0
    routing = layer.router.forward

    def without_some(hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        probs, routing_map = routing(hidden, *rest)
        maps.append(kept(routing_map, keep))
        return probs.masked_fill(~maps[-1], 0.0), maps[-1]

    layer.router.forward = without_some
    found = step(layer, hidden_states(CPU, tokens_of_rank_1 if dist.get_rank() == 1 else TOKENS, 1))
    wanted = maps[0].sum(dim=0)
    dist.all_reduce(wanted)
    counted = megatron_ep_v2.expert_load()[-1].tolist() if dispatcher == "flex" else wanted.tolist()
    return found, counted, wanted.tolist()


def compare(group: Any) -> dict[str, Any]:
    """ "case, layout" -> relative L2 of each tensor, what was counted, and what should be."""
    answers = {}
    with process_groups():
        use_dispatcher(CPU, "alltoall")
        theirs = {name: run_case("alltoall", case)[0] for name, case in CASES.items()}
        for layout in LAYOUTS:
            for name, case in CASES.items():
                use_dispatcher(CPU, "flex", layout)
                ours, counted, wanted = run_case("flex", case)
                read_all()
                assert len(pool.buffers()) == 1
                answers[f"{name}, {layout}"] = relative_errors(ours, theirs[name]), counted, wanted
    return answers


def test_they_do_not_travel_and_everything_else_is_as_with_alltoall() -> None:
    answers = run_ranks(2, compare)
    for rank, by_case in enumerate(answers):
        for name, (errors, counted, wanted) in by_case.items():
            assert counted == wanted, f"rank {rank}, {name}"
            assert "gradient of x 0" in errors and "router.weight" in errors
            assert any(".linear_fc1" in key for key in errors)
            for key, error in errors.items():
                assert error <= 2e-6, f"rank {rank}, {name}, {key}: relative L2 {error:.1e}"
    zero = {name for name, (_, _, wanted) in answers[0].items() if not sum(wanted)}
    assert zero == {f"no rank has an expert, {layout}" for layout in LAYOUTS}
