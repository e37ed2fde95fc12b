"""Sync-free forwards without gradients: they make room for what comes, and no training step pays for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

import megatron_ep_v2
from megatron_ep_v2 import sync_free
from megatron_ep_v2.device_checks import read_all
from megatron_ep_v2.errors import LayoutOverflowError
from megatron_ep_v2.sync_free import sync_free_combine, sync_free_dispatch
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import build_layer, hidden_states, make_layer, process_groups, step
from tests.helpers.shapes import CPU


def evaluate_and_train(group: Any) -> dict[str, Any]:
    """A training step that fits, an evaluation that does not, and another such step."""
    found: dict[str, Any] = {}
    with process_groups():
        small, big = hidden_states(CPU, 6, 1), hidden_states(CPU, CPU.tokens, 1)
        with torch.no_grad():
            wanted = make_layer(CPU, "flex", "expanded", "grouped").eval()(big)[0]
        megatron_ep_v2.uninstall()
        megatron_ep_v2.install(
            buffer="reference", num_max_tokens_per_rank=CPU.tokens, sync_free=True, sync_free_rows_percent=60
        )
        layer = build_layer(CPU, "flex", "grouped")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        step(layer, small)
        optimizer.step()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found[mode.__name__] = float((layer.eval()(big)[0] - wanted).abs().max() / wanted.abs().max())
        step(layer.train(), small)
        optimizer.step()
        # A checkpoint's first run is without gradients, too, but is training.
        checkpoint(lambda x: layer(x)[0], big.requires_grad_(), use_reentrant=True).sum().backward()
        try:
            optimizer.step()
            found["training"] = "stepped"
        except LayoutOverflowError as error:
            found["training"] = str(error)
    return found


def test_an_evaluation_finds_room_and_blames_no_training_step() -> None:
    for found in run_ranks(2, evaluate_and_train):
        assert found["no_grad"] < 1e-6 and found["inference_mode"] < 1e-6
        assert "more rows in this step than its experts have room for" in found["training"]


def detect_anomalies(group: Any) -> list[torch.Tensor]:
    """Gradients with and without anomaly detection, where most rows are garbage."""
    megatron_ep_v2.install(buffer="reference", sync_free=True, num_max_tokens_per_rank=16, sync_free_rows_percent=0)
    found = []
    try:
        for anomaly in (False, True):
            x = torch.arange(32.0).view(4, 8).requires_grad_()
            with torch.autograd.set_detect_anomaly(anomaly):
                rows, probs, _, handle = sync_free_dispatch(
                    x, torch.tensor([[0, 3], [2, 1], [1, 3], [3, 0]]), torch.ones(4, 2), 4, group
                )
                sync_free_combine(rows * probs[:, None], group, handle).sum().backward()
            read_all()
            found.append(x.grad)
    finally:
        megatron_ep_v2.uninstall()
    return found


def test_anomaly_detection_meets_no_garbage() -> None:
    for plain, watched in run_ranks(2, detect_anomalies):
        assert torch.equal(plain, torch.full((4, 8), 2.0)) and torch.equal(watched, plain)


def test_the_room_follows_a_buffer_whose_capacity_was_raised() -> None:
    """Else `grow()` would stop at what could arrive before."""

    class Buffer:
        group = SimpleNamespace(size=lambda: 2)
        num_max_tokens_per_rank = 10

    buffer: Any = Buffer()
    rooms = [sync_free._room(buffer, 3, 8, torch.empty(0, 8))]
    buffer.num_max_tokens_per_rank = 20
    rooms += [sync_free._room(buffer, 3, 8, torch.empty(0, 8)) for _ in range(2)]
    assert [room.most for room in rooms] == [60, 120, 120] and rooms[1] is rooms[2]
    assert [room.num_selections for room in rooms] == [60, 120, 120], "200 % of an even share, which is all"
