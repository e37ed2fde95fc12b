"""Recompute on GPUs: no second layout, no wait in the replay, and a changed routing stops the step."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import megatron_ep_v2
from megatron_ep_v2.device_checks import read_all
from megatron_ep_v2.errors import RoutingChangedError
from megatron_ep_v2.gpus import gpu_ranks
from tests.gpu.waits import traced
from tests.helpers.carriers import buffer_class, v2_carrier
from tests.helpers.compare import relative_errors, worst
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import build_layer, hidden_states, make_layer, process_groups, step, use_dispatcher
from tests.helpers.moe_features import WHOLE_LAYER
from tests.helpers.progress import say
from tests.helpers.recorded_dispatches import alive, recorded
from tests.helpers.replay_kernels import wrong
from tests.helpers.shapes import GPU

RANKS = gpu_ranks()

pytestmark = pytest.mark.usefixtures("transformer_engine")


def replay(group: Any) -> dict[str, dict[str, Any]]:
    """Layout -> dispatches, waits during the backward that recomputes, handles left, distance from no recompute."""
    found = {}
    with process_groups():
        hidden = hidden_states(GPU, GPU.tokens, 1)
        for layout in ("compact", "expanded"):
            say(f"{layout}: replay", group)
            use_dispatcher(GPU, "flex", layout)
            plain = step(build_layer(GPU, "flex"), hidden)
            layer = build_layer(GPU, "flex", **WHOLE_LAYER)
            again = step(layer, hidden)
            distance = relative_errors(again, plain)
            with recorded(buffer_class(v2_carrier())) as (calls, handles):
                y = layer(hidden.requires_grad_())[0]
                forward = len(calls)
                trace = traced(functools.partial(y.backward, torch.ones_like(y)))
                del y
                found[layout] = {
                    "calls": list(calls),
                    "forward": forward,
                    "waits": trace.waits,
                    "alive": alive(handles),
                    "distance": distance,
                }
            megatron_ep_v2.destroy_buffers()
    return found


def test_the_replay_waits_for_nothing() -> None:
    """deep_ep's own wait spins on host memory and is in no trace; only its dispatches without a handle have it."""
    for rank, found in enumerate(run_ranks(RANKS, replay, backend="nccl")):
        for layout, seen in found.items():
            where = f"rank {rank}, {layout}: {seen}"
            assert seen["calls"] == ["first", "cached", "gradient"] and seen["forward"] == 1, where
            assert seen["alive"] == 0, where
            # bf16 rounds weighted rows, partial sums and sums, each by at most 2**-9; weight gradients add up rows
            # in the order in which they came.
            assert all(error < 1.5e-2 for error in seen["distance"].values()), where
        # What Megatron's compact path waits for itself, it waits for again when it recomputes.
        assert not found["expanded"]["waits"], f"rank {rank}: {found['expanded']['waits']}"
        print(f"rank {rank}: waits in the replay, compact: {found['compact']['waits']}")


def checkpoints_of_torch(group: Any) -> dict[str, float]:
    """The largest relative distance of a gradient under torch's checkpoint, without `Replayed`, from a plain step's;
    and that of another plain step. deep_ep orders rows differently in each dispatch."""
    found = {}
    with process_groups():
        hidden = hidden_states(GPU, GPU.tokens, 1)
        for layout in ("compact", "expanded", "sync-free"):
            say(f"{layout}: torch's checkpoint", group)
            layer = make_layer(GPU, "flex", layout, "grouped" if layout == "sync-free" else None)

            def train(reentrant: bool | None, layer: Any = layer) -> dict[str, torch.Tensor]:
                layer.zero_grad(set_to_none=True)
                x = hidden.clone().requires_grad_()
                run = lambda h: layer(h)[0]  # noqa: E731
                y = run(x) if reentrant is None else checkpoint(run, x, use_reentrant=reentrant)
                y.backward(torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(y.dtype))
                read_all()
                return {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}

            plain = train(None)
            for name, reentrant in {"again": None, "reentrant": True, "without reentry": False}.items():
                actual = train(reentrant)
                found[f"{layout}, {name}"] = worst(relative_errors(actual, plain).values())
    return found


def test_the_kernels_compare_routings_as_in_plain_loops() -> None:
    from megatron_ep_v2.kernels import replay, replay_triton

    assert wrong(replay_triton, "cuda") == [] and wrong(replay, "cuda") == []


def test_torchs_checkpoint_is_right_by_itself() -> None:
    for rank, found in enumerate(run_ranks(RANKS, checkpoints_of_torch, backend="nccl")):
        print(f"rank {rank}: {found}")
        assert worst(found.values()) < 1.5e-2, found  # with the rows of another dispatch it is above 1


def change(group: Any) -> tuple[str, bool]:
    """Rank 1's router changes between the forward and its recompute; the backward goes on, the step does not."""
    with process_groups():
        layer = make_layer(GPU, "flex", **WHOLE_LAYER)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        hidden = hidden_states(GPU, GPU.tokens, 1).requires_grad_()
        y = layer(hidden)[0]
        if group.rank() == 1:
            layer.router.weight.data.neg_()
        y.sum().backward()
        before = [parameter.detach().clone() for parameter in layer.parameters()]
        try:
            optimizer.step()
        except RoutingChangedError as error:
            unchanged = all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
            step(layer, hidden.detach())
            optimizer.step()  # the next step is a good one
            return str(error), unchanged
    return "nothing was raised", False


def test_a_changed_routing_stops_every_rank_before_the_optimizer() -> None:
    for said, unchanged in run_ranks(RANKS, change, backend="nccl"):
        assert "on rank(s) [1] of the group" in said and unchanged


def checkpoint_of_te(group: Any) -> list[str]:
    """The checkpoint that Megatron takes for FP8."""
    from megatron.core.extensions.transformer_engine import te_checkpoint
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with process_groups():
        layer = make_layer(GPU, "flex")
        hidden = hidden_states(GPU, GPU.tokens, 1).requires_grad_()
        with recorded(buffer_class(v2_carrier())) as (calls, _):
            y = te_checkpoint(lambda x: layer(x)[0], False, get_cuda_rng_tracker, None, hidden)
            y.sum().backward()
        return list(calls)


def test_transformer_engines_checkpoint_replays_too() -> None:
    assert run_ranks(RANKS, checkpoint_of_te, backend="nccl") == [["first", "cached", "gradient"]] * RANKS
