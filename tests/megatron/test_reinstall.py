"""`install()` again and `uninstall()` while layers are alive: what Megatron's configuration decided holds, and a layer
runs on nothing but what it was built for."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import ClosedError, SettingsError
from megatron_ep_v2.megatron import binding
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import FlexLayer, build_layer, hidden_states, process_groups, step, use_dispatcher
from tests.helpers.reports import Report, assert_report, attempt
from tests.helpers.shapes import CPU, Split

WIDE = replace(CPU, hidden=128)  # a group of 8-bit columns
DECIDED = {
    "deterministic": "True (Megatron's --deterministic-mode)",
    "num_sms": "24 (Megatron's SM count)",
    "dispatch_dtype": "fp8 (auto: the model's fp8_recipe is blockwise, with the same groups)",
    "grad_dispatch_dtype": "fp8 (auto: the model's fp8_recipe is blockwise, with the same groups)",
}
GIVEN = {"deterministic": False, "num_sms": 32, "dispatch_dtype": "bf16", "grad_dispatch_dtype": "auto"}


def described() -> dict[str, str]:
    return {name: settings.active().describe()[name] for name in DECIDED}


def deciding_layer() -> Any:
    """A layer whose manager's configuration decides all of DECIDED; the experts' would ask for TransformerEngine."""
    use_dispatcher(WIDE, "flex")
    layer = build_layer(WIDE, "flex", deterministic_mode=True, moe_deepep_num_sms=24)
    dispatcher = layer.token_dispatcher
    manager = dispatcher._comm_manager
    config = copy.copy(manager.config)
    config.fp8, config.fp8_recipe = "hybrid", "blockwise"
    use_dispatcher(WIDE, "flex")
    dispatcher._comm_manager = type(manager)(
        manager.group, manager.num_local_experts, manager.router_topk, manager.num_experts, config
    )
    return layer


def decide(group: Any) -> dict[str, Any]:
    """What is in force after each call; the steps in between are the same."""
    found: dict[str, Any] = {}
    with process_groups():
        layer, hidden = deciding_layer(), hidden_states(WIDE, WIDE.tokens, 1)
        found["built"], steps = described(), [step(layer, hidden)]
        megatron_ep_v2.install(buffer="reference", num_max_tokens_per_rank=64)
        found["again"] = described()
        steps.append(step(layer, hidden))
        found["again, after a step"] = described()
        megatron_ep_v2.install(buffer="reference", **GIVEN)
        step(layer, hidden)
        found["given"] = described()
        with settings.environment(MCORE_DEEPEP_V2_NUM_SMS="28", MCORE_DEEPEP_V2_DETERMINISTIC="off"):
            megatron_ep_v2.install(buffer="reference")
        step(layer, hidden)
        found["by variables"] = described()
        megatron_ep_v2.uninstall()
        found["uninstalled"] = described()
        use_dispatcher(WIDE, "flex")
        steps.append(step(layer, hidden))
        found["the same again, after a step"] = described()
        del layer
        megatron_ep_v2.install(buffer="reference", num_max_tokens_per_rank=64)
        found["without a layer"] = described()
        found["apart"] = [max(float((a[name] - b[name]).abs().max()) for name in a) for a, b in pairwise(steps)]
    return found


def test_what_megatrons_configuration_decided_holds_until_a_value_is_given() -> None:
    for found in run_ranks(2, decide, fresh=True):  # it asks whether any layer of the process is alive
        for call in ("built", "again", "again, after a step", "the same again, after a step"):
            assert found[call] == DECIDED, call
        given = {name: f"{value} (install())" for name, value in GIVEN.items()}
        assert found["given"] == given | {"grad_dispatch_dtype": DECIDED["grad_dispatch_dtype"]}
        by_variable = {name: f"{value} (MCORE_DEEPEP_V2_{name.upper()})" for name, value in [("num_sms", 28)]}
        by_variable["deterministic"] = "False (MCORE_DEEPEP_V2_DETERMINISTIC)"
        assert found["by variables"] == DECIDED | by_variable
        nothing = {name: f"{getattr(settings.Settings(), name)} (default)" for name in DECIDED}
        assert found["uninstalled"] == found["without a layer"] == nothing
        assert found["apart"] == [0.0, 0.0]


# ------------------------------------------------------------------------------------- layers of another installation

INSTALLATIONS: dict[str, dict[str, Any]] = {
    "layout=compact, experts=megatron": {"layout": "compact"},
    "layout=expanded, experts=megatron": {"layout": "expanded"},
    "layout=expanded, experts=grouped": {"layout": "expanded", "experts": "grouped"},
    "layout=sync-free, experts=grouped": {"sync_free": True, "experts": "grouped"},
}


def run_where_it_was_not_built(group: Any) -> dict[str, dict[str, Any]]:
    """Installation -> "uninstalled" or another installation -> what its layer raises there, and buffers made."""
    found: dict[str, dict[str, Any]] = {}
    with process_groups():
        hidden = hidden_states(CPU, CPU.tokens, 1)
        for name, wanted in INSTALLATIONS.items():
            reports = found[name] = {}
            megatron_ep_v2.uninstall()
            megatron_ep_v2.install(buffer="reference", **wanted)
            layer = build_layer(CPU, "flex")
            first = step(layer, hidden)
            for other, more in INSTALLATIONS.items():
                if other != name:
                    megatron_ep_v2.install(buffer="reference", **more)
                    reports[other] = attempt(lambda layer=layer: layer(hidden)), len(pool.buffers())
            megatron_ep_v2.uninstall()
            reports["uninstalled"] = attempt(lambda layer=layer: layer(hidden)), len(pool.buffers())
            megatron_ep_v2.install(buffer="reference", **wanted)
            second = step(layer, hidden)
            reports["apart"] = max(float((first[key] - second[key]).abs().max()) for key in first)
            reports["unbound between dispatch and combine"] = attempt(lambda: combine_after_uninstall()), 0
    return found


def combine_after_uninstall() -> None:
    """The manager alone."""
    layer, hidden = FlexLayer(CPU, Split(1, 2)), hidden_states(CPU, 8)
    rows = layer.dispatch(hidden, *layer.router(hidden))[0]
    megatron_ep_v2.uninstall()
    layer.combine(rows)


def test_a_layer_runs_only_on_what_it_was_built_for() -> None:
    """Every rank raises, so none waits for another."""
    for found in run_ranks(2, run_where_it_was_not_built):
        for name, reports in found.items():
            assert reports.pop("apart") < 1e-6, name  # sums of three, in any order
            assert len(reports) == len(INSTALLATIONS) + 1
            for other, (report, buffers) in reports.items():
                assert buffers == 0, "it has dispatched"
                if other in INSTALLATIONS:
                    assert_report(report, SettingsError, f"built for {name}; installed: {other}", "fix: ")
                else:
                    assert_report(report, ClosedError, f"built for {name}", "uninstall()", "fix: ")


@contextlib.contextmanager
def legacy_deep_ep() -> Iterator[None]:
    """Megatron's own manager can be made; it is not run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fused_dispatch", "fused_combine", "set_deepep_num_sms"):
            patch.setattr(token_dispatcher, name, lambda *_: None)
        yield


def build_before(group: Any) -> Report:
    with process_groups():
        with legacy_deep_ep():
            layer = build_layer(CPU, "flex")
        megatron_ep_v2.install(buffer="reference")
        return attempt(lambda: layer(hidden_states(CPU, 8, 1)))


def test_a_layer_of_megatrons_own_manager_is_refused() -> None:
    """It would run compact, while status() says expanded."""
    for report in run_ranks(2, build_before):
        assert_report(report, SettingsError, "before megatron_ep_v2.install()", "layout=expanded", "fix: ")


def change_between_two(group: Any) -> dict[str, list[float]]:
    """Layers of two installations, each run with its own names bound: as the benchmarks do."""
    with process_groups():
        hidden, layers = hidden_states(CPU, CPU.tokens, 1), {}
        for layout in ("compact", "expanded"):
            use_dispatcher(CPU, "flex", layout)
            layers[layout] = build_layer(CPU, "flex"), binding.bound()
        megatron_ep_v2.uninstall()
        outputs: dict[str, list[torch.Tensor]] = {layout: [] for layout in layers}
        for layout in ("compact", "expanded", "compact"):
            layer, bound = layers[layout]
            for owner, name, _, ours in bound:
                setattr(owner, name, ours)
            outputs[layout].append(layer(hidden)[0])
            for owner, name, theirs, _ in reversed(bound):
                setattr(owner, name, theirs)
        gc.collect()
        expected = outputs["compact"][0]
        return {layout: [float((y - expected).abs().max()) for y in found] for layout, found in outputs.items()}


def test_code_that_changes_between_several_bindings_may_go_on() -> None:
    for found in run_ranks(2, change_between_two):
        assert len(found["compact"]) == 2 and max(*found["compact"], *found["expanded"]) < 1e-6
