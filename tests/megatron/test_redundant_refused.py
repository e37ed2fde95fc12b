"""What redundant experts do not go with is refused by name: at `install()`, when a layer is built, at its dispatch."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

import megatron_ep_v2
from megatron_ep_v2.buffers import carriers
from megatron_ep_v2.errors import EPError, InputError, SettingsError
from megatron_ep_v2.experts import gemm
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import FlexLayer, installed, process_groups
from tests.helpers.megatron_names import clean, set_cuda, set_deep_ep
from tests.helpers.redundant_layer import PLANS, add_layer, inputs, install, step
from tests.helpers.reports import Report, assert_report, attempt
from tests.helpers.shapes import CPU, Split

__all__ = ["clean"]  # a fixture

in_this_process = pytest.mark.usefixtures("clean")
ON: dict[str, Any] = {"redundant_experts": 2, "experts": "grouped"}
OFF = "unset MCORE_DEEPEP_V2_REDUNDANT_EXPERTS"


@in_this_process
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"experts": "megatron"},
            ("experts=megatron", "experts from install()", "experts=grouped, or sequential", OFF),
        ),
        ({"sync_free": True}, ("the sync-free layout", "sync_free is on", "the expanded layout", OFF)),
        ({"layout": "compact"}, ("the compact layout", "asked for by install()", OFF)),
        ({"allow_multiple_reduction": False, "layout": "compact"}, ("the compact layout", OFF)),
        ({"balance_min_rows": 0}, ("balance_min_rows=0", "1 or more")),
        ({"balance_from_percent": 99}, ("balance_from_percent=99", "100 or more")),
    ],
)
def test_settings_that_exclude_them(settings: dict[str, Any], words: tuple[str, ...]) -> None:
    report = attempt(lambda: megatron_ep_v2.install(buffer="reference", **{**ON, **settings}))
    assert_report(report, SettingsError, *words)
    assert megatron_ep_v2.status()["installed"] is False


@in_this_process
def test_deepgemms_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm.DeepGemm, "require", lambda *_: None)
    report = attempt(lambda: megatron_ep_v2.install(buffer="reference", **{**ON, "experts": "deepgemm"}))
    assert_report(report, SettingsError, "experts=deepgemm", "experts=grouped, or sequential")


@in_this_process
@pytest.mark.parametrize(
    ("classes", "name"), [(("ElasticBuffer",), "ElasticBuffer"), (("Buffer",), "legacy Buffer")], ids=["2.1", "legacy"]
)
def test_deep_ep_before_2_5(classes: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cuda(monkeypatch, True)
    set_deep_ep(monkeypatch, *classes)
    report = attempt(lambda: megatron_ep_v2.install(redundant_experts=1, experts="sequential"))
    assert_report(report, SettingsError, name, "the EPBuffer or the reference buffer", "install DeepEP 2.5", OFF)


def test_the_buffers_that_say_they_move_experts_have_the_calls() -> None:
    for carrier in carriers.CARRIERS.values():
        module, name = carrier.path
        kind = getattr(importlib.import_module(module), name)
        calls = [hasattr(kind, call) for call in ("slots", "prefetch_weights", "reduce_grads")]
        assert calls == [carrier.moves_experts] * 3, carrier.name


def built(group: Any) -> dict[str, Report | None]:
    """What is refused when a layer is built, and at the dispatch of one that does not fit the group's buffer."""
    found: dict[str, Report | None] = {}
    with installed(Split(1, 2), **ON, **PLANS):
        more = {"overlap_moe_expert_parallel_comm": True, "bf16": True, "params_dtype": torch.bfloat16}
        found["1F1B overlap"] = attempt(lambda: FlexLayer(CPU, Split(1, 2), **more))
        found["none"] = attempt(lambda: FlexLayer(CPU, Split(1, 2)))
    with installed(Split(2, 1), **ON, **PLANS):
        found["expert tensor parallelism"] = attempt(lambda: FlexLayer(CPU, Split(2, 1)))
    topk_idx = torch.tensor([[0, 1, 2]] * 9)
    x, grad = inputs(CPU, 9)
    with process_groups():
        install("sequential", 1)
        good = add_layer(CPU, "sequential", topk_idx)
        step(good, x, grad)
        found["another size"] = attempt(lambda: step(add_layer(replace(CPU, ffn=16), "sequential", topk_idx), x, grad))
        good.token_dispatcher._comm_manager = copy.deepcopy(good.token_dispatcher._comm_manager)
        good.experts = copy.deepcopy(good.experts)
        found["a copy"] = attempt(lambda: step(good, x, grad))
        other = add_layer(CPU, "sequential", topk_idx)
        other.experts.forward = lambda rows, counts, probs: (rows * probs[:, None], None)
        found["other experts"] = attempt(lambda: other(x))
        found["another dtype"] = attempt(lambda: step(good.double(), x.double(), grad.double()))
        megatron_ep_v2.install(buffer="reference", experts="sequential", redundant_experts=2, **PLANS)
        found["another number"] = attempt(lambda: step(good.float(), x, grad))
    return found


def test_layers_that_do_not_go_with_them() -> None:
    wanted: dict[str, tuple[type[EPError], tuple[str, ...]]] = {
        "1F1B overlap": (SettingsError, ("overlap_moe_expert_parallel_comm=True", OFF)),
        "expert tensor parallelism": (SettingsError, ("expert_tensor_parallel_size=2", OFF)),
        "another size": (InputError, ("no replica slots for the experts of this layer", "(32, 64)", "(64, 64)")),
        "other experts": (SettingsError, ("cannot run them", "megatron_ep_v2.megatron.experts")),
        "another dtype": (InputError, ("torch.float64 (4, 64, 64)", "torch.float32", "params_dtype")),
        "another number": (SettingsError, ("redundant_experts=1; installed", "redundant_experts=2")),
    }
    for found in run_ranks(2, built):
        assert found.pop("none") is None and found.pop("a copy") is None
        assert found.keys() == wanted.keys()
        for name, (kind, words) in wanted.items():
            assert_report(found[name], kind, *words)
