"""Layers that are built on the device "meta", copied or pickled; and a step calls nothing that torch deprecates."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2.device_checks import DeviceCheck, read_all
from megatron_ep_v2.errors import EPError
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.megatron_layer import hidden_states, installed, moe_layer_of, set_weights, transformer_config
from tests.helpers.reports import assert_report, attempt
from tests.helpers.shapes import Shape, Split

SPLIT = Split(1, 2)
SHAPE = Shape(hidden=256)
TOKENS, ROOM = 8, 12  # a rank's; there are rows that a sync-free dispatch leaves as they are
MARKS = {"allreduce": False, "tensor_model_parallel": True, "stacked_experts": True}
OF_LAYOUT: dict[str, dict[str, Any]] = {
    "compact": {"layout": "compact"},
    "expanded": {"layout": "expanded"},
    "sync-free": {"sync_free": True, "experts": "grouped", "sync_free_rows_percent": 0},
}


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def make_layer(device: str = "cpu") -> Any:
    """A MoE layer that is built on this device and materialised on the CPU, with the same weights every time."""
    with default_device(device):
        layer = moe_layer_of(transformer_config(SHAPE, SPLIT))
    if device == "meta":
        assert all(parameter.is_meta for parameter in layer.parameters()), "nothing was allocated"
        layer.to_empty(device="cpu")
    set_weights(layer, 0.1)
    return layer


def step(layer: Any, device: str = "cpu") -> list[torch.Tensor]:
    """Output, gradients and expert load of one batch on the CPU, while another device is torch's default."""
    x = hidden_states(SHAPE, TOKENS, 1).requires_grad_()
    grad = hidden_states(SHAPE, TOKENS, 1, seed=1)
    with default_device(device):
        output = layer(x)[0]
        output.backward(grad)
        load = megatron_ep_v2.expert_load()[-1]  # of the youngest layer
    gradients = [parameter.grad for _, parameter in sorted(layer.named_parameters())]
    layer.zero_grad()
    return [output.detach(), x.grad, *gradients, load]


def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True] * len(got)


def marks(layer: Any) -> list[dict[str, Any]]:
    """Of this package's experts, as Megatron's DDP, its gradient norm and checkpoints look for them."""
    linears = [getattr(layer.experts, name, None) for name in ("linear_fc1", "linear_fc2")]
    return [vars(linear.weight) for linear in linears if linear is not None]


# ------------------------------------------------------------------------------------------------ other default devices


@isolated
def build_on_meta(group: Any) -> dict[str, tuple[bool, int, list[Any], set[str]]]:
    """By layout: whether all is equal to a layer that was built as usual, the rows that its experts got, their marks,
    and the devices of what a checkpoint of them keeps besides weights."""
    found = {}
    for name, more in OF_LAYOUT.items():
        with installed(SPLIT, num_max_tokens_per_rank=ROOM, **more):
            layer = make_layer("meta")
            got = step(layer, "meta")  # the buffer is made in it
            with default_device("meta"):
                state = layer.experts.sharded_state_dict() if marks(layer) else {}
            kept = {part.data.device.type for name, part in state.items() if "_extra_state" in name}
            found[name] = (equal(got, step(make_layer())), int(got[-1].sum()), marks(layer), kept)
    return found


def test_a_model_that_is_built_and_trained_while_another_device_is_the_default() -> None:
    for found in run_ranks(2, build_on_meta):
        for name, (same, rows, kept_marks, devices) in found.items():
            assert same, name
            assert rows == SPLIT.size * TOKENS * SHAPE.topk
            assert kept_marks == [MARKS] * (2 * (name == "sync-free"))
            assert devices <= {"cpu"} and bool(devices) == (name == "sync-free")


# ----------------------------------------------------------------------------------------------------- copies of layers


@isolated
def copy_layers(group: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for name, more in OF_LAYOUT.items():
        with installed(SPLIT, num_max_tokens_per_rank=ROOM, **more):
            layer = make_layer()
            expected = step(layer)
            if name == "compact":  # Megatron's own manager keeps tensors of a step, which torch does not copy
                layer = make_layer()
            with pytest.raises(TypeError, match=r"cannot pickle .*ProcessGroup"):  # as with Megatron's own dispatchers
                copy.deepcopy(layer)
            groups = {id(known): known for known in dist.distributed_c10d._world.pg_map}
            twin = copy.deepcopy(layer, groups)
            got = step(twin)
            with torch.no_grad():
                layer(hidden_states(SHAPE, TOKENS, 1))
            manager = twin.token_dispatcher._comm_manager
            parts = [manager, manager.expert_load]
            found[name] = {
                "equal": equal(got, expected),
                "loads": [int(load.sum()) for load in megatron_ep_v2.expert_load()[-2:]],
                "group": manager.group is layer.token_dispatcher._comm_manager.group,
                "marks": marks(twin),
            }
            if marks(layer):
                parts.append(copy.deepcopy(layer.experts))
                found[name]["experts"] = equal([*parts[-1].parameters()], [*layer.experts.parameters()])
            found[name]["shallow"] = all(vars(copy.copy(part)).keys() == vars(part).keys() for part in parts)
            found[name]["pickled"] = [attempt(lambda part=part: pickle.dumps(part)) for part in parts]
    return found


def test_a_copy_of_a_layer_works_and_is_counted_by_itself() -> None:
    """Given the process groups, which torch cannot copy."""
    for found in run_ranks(2, copy_layers):
        for name, of_layout in found.items():
            assert of_layout["equal"] and of_layout["group"], name
            assert of_layout["loads"] == [SPLIT.size * TOKENS * SHAPE.topk, 0]
            assert of_layout["marks"] == [MARKS] * (2 * (name == "sync-free"))
            assert of_layout.get("experts", True) and of_layout["shallow"]
            for report in of_layout["pickled"]:
                assert_report(report, EPError, "of a MoE layer cannot be pickled", "process groups", "state_dict()")


# -------------------------------------------------------------------------------------------------- warnings of torch


@isolated
def use_torch(group: Any) -> list[int]:
    """A step of each layout, and a read of checks over the group, in which what torch has deprecated is an error, and
    so is what else this package is warned of. (Megatron's own modules warn each other.)"""
    rows = []
    for more in OF_LAYOUT.values():
        with installed(SPLIT, num_max_tokens_per_rank=ROOM, **more):
            layer = make_layer()
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)
                warnings.filterwarnings("error", category=DeprecationWarning, module="megatron_ep_v2")
                rows.append(int(step(layer)[-1].sum()))
                check = DeviceCheck(lambda counts: EPError(f"counted {counts}"), torch.device("cpu"), group)
                check.add(torch.tensor(group.rank()))
                with pytest.raises(EPError, match=r"counted \{1: 1\}"):
                    read_all()
    return rows


def test_nothing_that_torch_deprecates_is_called() -> None:
    assert run_ranks(2, use_torch) == [[SPLIT.size * TOKENS * SHAPE.topk] * len(OF_LAYOUT)] * 2
