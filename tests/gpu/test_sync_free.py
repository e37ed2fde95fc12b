"""Sync-free mode on GPUs: no host wait in a trace, CUDA graphs, overflow, poisoned tails."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings, sync_free
from megatron_ep_v2.bench.expert_layer import ExpertLayer, Sizes
from megatron_ep_v2.device_checks import read_all
from megatron_ep_v2.errors import LayoutOverflowError
from megatron_ep_v2.gpus import gpu_ranks
from tests.gpu.waits import traced
from tests.helpers.carriers import v2_carrier
from tests.helpers.compare import relative_errors
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups, step
from tests.helpers.poison import poison_tails
from tests.helpers.progress import say
from tests.helpers.shapes import GPU

RANKS = gpu_ranks()
SIZES = Sizes()
# bf16 rounds rows, activations, partial sums and sums, each by at most 2**-9; the same numbers in another order.
TOLERANCE = 1.5e-2

pytestmark = pytest.mark.usefixtures("transformer_engine")


def start(**more: Any) -> None:
    """With the watchdog, which must not get in a graph's way."""
    chosen = {"buffer": v2_carrier(), "num_max_tokens_per_rank": SIZES.tokens, "watchdog_secs": 30}
    settings.activate(settings.resolve(**chosen, **more))


def trace(step: Callable[[], object]) -> dict[str, Any]:
    """Waits and deep_ep's dispatch kernels, as (host wait, cached), of one step."""
    step()
    found = traced(step)
    forms = [
        tuple("true" in word or word.endswith("1") for word in match.group(1).split(",")[1:3])
        for match in (re.search(r"::dispatch_impl<([^>]*)>", name) for name in found.kernels.elements())
        if match
    ]
    return {"waits": found.waits, "dispatches": forms, "kernels": found.kernels.total()}


@isolated
def layers(group: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    start(sync_free_rows_percent=180)
    layer = ExpertLayer(SIZES, group, torch.device("cuda"))
    say("traces", group)
    found["expanded trace"] = trace(lambda: layer.step(layer.expanded))
    found["trace"] = trace(lambda: layer.step(layer.sync_free))
    torch.cuda.set_sync_debug_mode("error")  # torch's own waits raise
    try:
        ours = layer.step(layer.sync_free)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    theirs = layer.step(layer.expanded)
    found["eager"] = relative_errors(ours, theirs)
    read_all()

    say("graph", group)
    graph, results = layer.capture()
    for seed in (1, 2):
        layer.fill(seed, skew=0.01 * seed)
        for tensor in results.values():
            tensor.fill_(float("nan"))
        graph.replay()
        replayed = {name: tensor.clone() for name, tensor in results.items()}
        found[f"graph, batch {seed}"] = relative_errors(replayed, layer.step(layer.expanded))
        found[f"graph and eager, batch {seed}"] = relative_errors(replayed, layer.step(layer.sync_free))
    read_all()

    say("overflow", group)
    layer.fill(3, skew=10.0)  # everything to the last rank
    graph.replay()
    found["overflow in a graph"] = overflow()
    layer.step(layer.sync_free)
    found["overflow"] = overflow()
    found["grown"] = sync_free.grow()
    del graph, results
    replayed = layer.step(layer.sync_free)
    read_all()
    found["replayed"] = relative_errors(replayed, layer.step(layer.expanded))

    say("evaluation", group)
    sync_free._rooms.clear()  # as little room as at first
    with torch.no_grad():
        wanted = {"output": layer.expanded()}
        found["evaluation"] = relative_errors({"output": layer.sync_free()}, wanted)
        read_all()  # it has made room, and nothing is left to say
        evaluation = torch.cuda.CUDAGraph()
        with torch.cuda.graph(evaluation, capture_error_mode="thread_local"):
            layer.sync_free()
        evaluation.replay()
        found["captured evaluation"] = overflow()
        found["grown after an evaluation"] = sync_free.grow()
    del evaluation

    say("poison", group)
    layer.fill(4)
    clean = layer.step(layer.expanded)
    poison_tails(group)
    found["poisoned"] = relative_errors(layer.step(layer.sync_free), clean)
    return found


def whole_layer(group: Any) -> dict[str, Any]:
    """Megatron's MoE layer (router, dispatcher, our grouped experts), eagerly and in a graph."""
    found: dict[str, Any] = {}
    with process_groups():
        hidden, results = hidden_states(GPU, GPU.tokens, 1), {}
        for layout in ("expanded", "sync-free"):
            say(f"Megatron's layer, {layout}", group)
            layer = make_layer(GPU, "flex", layout, "grouped")
            found[f"{layout} trace"] = trace(functools.partial(step, layer, hidden))
            results[layout] = step(layer, hidden)
        found["eager"] = relative_errors(results["sync-free"], results["expanded"])

        say("Megatron's layer in a graph", group)
        x, parameters = hidden.clone().requires_grad_(), dict(layer.named_parameters())

        def run() -> dict[str, torch.Tensor]:
            y = layer(x)[0]
            gradients = torch.autograd.grad(y, [x, *parameters.values()], torch.ones_like(y))
            return {"output": y.detach(), **dict(zip(["x", *parameters], gradients, strict=True))}

        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(other)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            captured = run()
        with torch.no_grad():
            x.copy_(hidden.flip(0) * 0.5)  # other tokens in another order
        graph.replay()
        replayed = {name: tensor.clone() for name, tensor in captured.items()}
        found["graph"] = relative_errors(replayed, run())
        read_all()
    return found


def overflow() -> str:
    with pytest.raises(LayoutOverflowError) as caught:
        read_all()
    return str(caught.value)


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = run_ranks(RANKS, layers, backend="nccl")
    for name, value in answers[0].items():
        print(f"{name}: {value}")
    return answers


def test_the_host_waits_for_nothing(found: list[dict[str, Any]]) -> None:
    for answer in found:
        assert answer["trace"]["waits"] == {}
        # deep_ep's own wait spins on host memory and is in no trace. Its kernels are compiled for one way or the other.
        assert sorted(answer["expanded trace"]["dispatches"]) == [(False, True), (True, False)], "(host wait, cached)"
        assert sorted(answer["trace"]["dispatches"]) == [(False, False), (False, True)]


@pytest.mark.parametrize(
    "name",
    [
        "eager",
        *(f"graph{eager}, batch {n}" for eager in ("", " and eager") for n in (1, 2)),
        "replayed",
        "evaluation",
        "poisoned",
    ],
)
def test_outputs_and_gradients_are_those_of_the_expanded_layout(found: list[dict[str, Any]], name: str) -> None:
    for rank, answer in enumerate(found):
        for tensor, error in answer[name].items():
            assert error < TOLERANCE, f"rank {rank}, {name}, {tensor}: relative L2 {error:.1e}"


def test_megatrons_whole_layer_waits_for_nothing_and_can_be_captured() -> None:
    answers = run_ranks(RANKS, whole_layer, backend="nccl")
    print(answers[0])
    for rank, answer in enumerate(answers):
        assert answer["sync-free trace"]["waits"] == {}
        assert sorted(answer["sync-free trace"]["dispatches"]) == [(False, False), (False, True)]
        for name in ("eager", "graph"):
            for tensor, error in answer[name].items():
                assert error < TOLERANCE, f"rank {rank}, {name}, {tensor}: relative L2 {error:.1e}"


def test_a_captured_evaluation_without_room_is_named_as_one(found: list[dict[str, Any]]) -> None:
    for answer in found:
        assert "in a captured evaluation" in answer["captured evaluation"]
        assert answer["grown after an evaluation"][0] > 180


@pytest.mark.parametrize("name", ["overflow", "overflow in a graph"])
def test_every_rank_says_the_same_of_an_overflow(found: list[dict[str, Any]], name: str) -> None:
    assert len({answer[name] for answer in found}) == 1
    assert f"rank {RANKS - 1} was sent more rows" in found[0][name]
    assert len({tuple(answer["grown"]) for answer in found}) == 1 and found[0]["grown"][0] > 180
