"""`install(experts=...)`: every MoE layer that Megatron builds gets these experts, whatever spec it is given; and what
is bound for them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_ep_v2
from megatron_ep_v2.errors import SeamError, SettingsError
from megatron_ep_v2.experts import gemm
from megatron_ep_v2.megatron import binding
from megatron_ep_v2.megatron.experts import EXPERTS, GroupedExperts, use_experts, with_experts
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups, transformer_config
from tests.helpers.megatron_names import clean, names, rebound, set_cuda, set_deep_ep
from tests.helpers.reports import assert_report, attempt
from tests.helpers.shapes import CPU, Split
from tests.megatron.test_install import BOUND, BOUND_EXPANDED

__all__ = ["clean"]  # a fixture

LAYER = ("MoELayer", "__init__")
VARIABLE = "MCORE_DEEPEP_V2_EXPERTS"
GUARDS = {key for key in BOUND if key[0] in ("DistributedOptimizer", "dist_checkpointing", "muon", "optimizer")}
GUARDS |= {(module, "extract_param_metadata") for module in ("planner", "utils")}

# Not for tests that start ranks: those processes would keep its environment for the tests after them.
in_this_process = pytest.mark.usefixtures("clean")


def config(**more: Any) -> TransformerConfig:
    return transformer_config(CPU, Split(1, 2), num_layers=2, num_attention_heads=4, **more)


# ----------------------------------------------------------------------------------------------- every spec of Megatron


def build(spec: Any, settings: TransformerConfig) -> Any:
    if isinstance(spec, ModuleSpec):
        return build_module(spec, config=settings, layer_number=1)
    return spec(config=settings, layer_number=1)


def submodules_of(spec: Any) -> MoESubmodules:
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


@functools.cache
def hybrid() -> tuple[Any, Any]:
    """The one `moe` of Megatron's hybrid models, and that in their stack's spec. Before 0.19 its module needs Triton:
    where that is not here, the same call by itself."""
    for name in ("megatron.core.models.hybrid.hybrid_layer_specs", "megatron.core.models.mamba.mamba_layer_specs"):
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(name)
            stack = getattr(module, "hybrid_stack_spec", None) or module.mamba_stack_spec
            return module.moe, stack.submodules.moe_layer.submodules.mlp
    moe = get_moe_module_spec(use_te=True, num_experts=8, moe_grouped_gemm=True)
    return moe, moe


def multi_token_prediction(settings: TransformerConfig) -> Any:
    """The block of one layer after the model's."""
    settings.mtp_num_layers = 1
    layer = get_gpt_layer_local_spec(num_experts=8, normalization="RMSNorm")
    spec = get_gpt_mtp_block_spec(settings, layer, use_transformer_engine=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return MultiTokenPredictionBlock(config=settings, spec=spec, pg_collection=groups)


def layers(installed: bool) -> dict[str, Callable[[TransformerConfig], Any]]:
    """What builds a module with a MoE layer. Without an installation: those that Megatron can build here by itself."""
    found: dict[str, Callable[[TransformerConfig], Any]] = {}
    for grouped in (False, True) if installed else (False,):
        options = {"num_experts": 8, "moe_grouped_gemm": grouped}
        found[f"module, grouped={grouped}"] = functools.partial(build, get_moe_module_spec(use_te=False, **options))
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", **options)
        found[f"layer, grouped={grouped}"] = functools.partial(build, layer)
    given = submodules_of(get_moe_module_spec(use_te=False, num_experts=8))
    found["by position"] = lambda settings: MoELayer(settings, given, 1)
    found["by keyword"] = lambda settings: MoELayer(layer_number=1, submodules=given, config=settings)
    found["multi-token prediction"] = multi_token_prediction
    if installed:
        found["hybrid"], found["hybrid's stack"] = (functools.partial(build, spec) for spec in hybrid())
    return found


def kinds(built: Any) -> set[str]:
    return {type(module.experts).__name__ for module in built.modules() if isinstance(module, MoELayer)}


def built_with(group: Any) -> tuple[dict[str, set[str]], dict[str, set[str]], list[str]]:
    """Classes of experts by layer, after install() and after uninstall(); what of the shared spec has changed."""
    found, after, changed = {}, {}, []
    with process_groups():
        shared = [submodules_of(spec) for spec in hybrid()]
        before = [dict(vars(submodules)) for submodules in shared]
        megatron_ep_v2.install(buffer="reference", experts="grouped")
        for name, layer in layers(True).items():
            found[name] = kinds(layer(config()))
        for submodules, held in zip(shared, before, strict=True):
            changed += [name for name, value in vars(submodules).items() if value is not held[name]]
        megatron_ep_v2.uninstall()
        for name, layer in layers(False).items():
            after[name] = kinds(layer(config(moe_token_dispatcher_type="allgather")))  # flex needs deep_ep then
    return found, after, changed


def test_every_layer_of_megatrons_specs_is_built_with_them() -> None:
    for found, after, changed in run_ranks(2, built_with):
        assert len(found) == 9 and found == {name: {"GroupedExperts"} for name in found}
        assert len(after) == 5 and after == {name: {"SequentialMLP"} for name in after}
        assert not changed, "the spec that all models share"


def own_spec(group: Any) -> list[set[str]]:
    """Layers of a spec with experts of this package, of one that install() has seen before, and of Megatron's."""
    with process_groups():
        megatron_ep_v2.install(buffer="reference", experts="grouped")
        spec = get_gpt_layer_local_spec(num_experts=8, normalization="RMSNorm")
        use_experts(spec, "sequential")
        ours = build(spec, config())
        megatron_ep_v2.install(buffer="reference", experts="megatron")
        plain = get_gpt_layer_local_spec(num_experts=8, normalization="RMSNorm")
        return [kinds(ours), kinds(build(spec, config())), kinds(build(plain, config()))]


def test_a_spec_that_has_experts_of_this_package_keeps_them() -> None:
    assert run_ranks(2, own_spec) == [[{"SequentialExperts"}, {"SequentialExperts"}, {"SequentialMLP"}]] * 2


@in_this_process
@pytest.mark.parametrize("kind", EXPERTS)
def test_what_a_patched_megatron_asks_for_is_the_same(kind: str, clean: pytest.MonkeyPatch) -> None:
    submodules = submodules_of(get_moe_module_spec(use_te=False, num_experts=8))
    assert binding.moe_submodules(submodules) is submodules, "no others were asked for"
    megatron_ep_v2.uninstall()
    clean.setenv(VARIABLE, kind)
    clean.setattr(gemm.GEMMS["deepgemm"], "require", lambda device: None, raising=False)
    assert binding.moe_submodules(submodules).experts is EXPERTS[kind] and submodules.experts is not EXPERTS[kind]
    assert with_experts(binding.moe_submodules(submodules), "grouped").experts is EXPERTS[kind]


# --------------------------------------------------------------------------------------------------- what is bound


@in_this_process
def test_megatrons_experts_bind_nothing_in_its_layer_and_others_its_constructor_alone() -> None:
    before = names()
    assert megatron_ep_v2.install()["experts"] == "megatron"
    assert rebound(before) == BOUND_EXPANDED and LAYER not in BOUND_EXPANDED
    status = megatron_ep_v2.install(experts="grouped")
    assert status["experts"] == "grouped" and rebound(before) == BOUND_EXPANDED | {LAYER}
    assert megatron_ep_v2.install(experts="megatron")["experts"] == "megatron" and rebound(before) == BOUND_EXPANDED
    megatron_ep_v2.uninstall()
    assert not rebound(before)


@in_this_process
def test_grouped_experts_are_sync_free() -> None:
    before = names()
    status = megatron_ep_v2.install(experts="grouped", sync_free=True)
    assert (status["experts"], status["layout"]) == ("grouped", "sync-free") and LAYER in rebound(before)


@in_this_process
def test_the_setting_and_its_variable(clean: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    status = megatron_ep_v2.install()
    assert (status["experts"], status["experts_reason"]) == ("megatron", "default")
    megatron_ep_v2.uninstall()
    clean.setenv(VARIABLE, " Grouped ")
    with caplog.at_level(logging.INFO, "megatron_ep_v2"):
        status = megatron_ep_v2.install()
    assert (status["experts"], status["experts_reason"]) == ("grouped", f"asked for by {VARIABLE}")
    assert status["settings"]["experts"] == f"grouped ({VARIABLE})"
    assert f"grouped experts (asked for by {VARIABLE})" in caplog.messages[-1]
    assert json.loads(json.dumps(status)) == megatron_ep_v2.status()
    with caplog.at_level(logging.INFO, "megatron_ep_v2"):
        status = megatron_ep_v2.install(experts="sequential")
    assert (status["experts"], status["experts_reason"]) == ("sequential", "asked for by install()")
    assert "sequential experts (asked for by install())" in caplog.messages[-1]
    clean.setenv(VARIABLE, "fast")
    report = attempt(lambda: megatron_ep_v2.install(layout="compact"))
    assert_report(report, SettingsError, f"'fast' from {VARIABLE}")
    assert megatron_ep_v2.status() == status, "a refused one leaves what was there"


@in_this_process
def test_next_to_megatrons_own_dispatcher(clean: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With the legacy deep_ep alone: experts, and what guards them, but nothing of the dispatcher."""
    set_cuda(clean, True)
    set_deep_ep(clean, "Buffer")
    clean.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    before = names()
    with caplog.at_level(logging.INFO, "megatron_ep_v2"):
        status = megatron_ep_v2.install(experts="grouped")
    assert (status["buffer"], status["experts"]) == ("megatron", "grouped")
    assert rebound(before) == GUARDS | {LAYER} and len(GUARDS) == 6
    for part in ("nothing in the dispatcher was changed", "grouped experts (asked for by install())"):
        assert part in caplog.messages[-1]
    with caplog.at_level(logging.INFO, "megatron_ep_v2"):
        status = megatron_ep_v2.install(experts="megatron")
    assert (status["buffer"], status["experts"]) == ("megatron", "megatron")
    assert not rebound(before) and ": nothing was changed" in caplog.messages[-1]


# ----------------------------------------------------------------------------- other wrappers of MoELayer's constructor


@in_this_process
def test_a_wrapped_constructor_matters_to_other_experts_only(clean: pytest.MonkeyPatch) -> None:
    def traced(self: Any, *args: Any, **kwargs: Any) -> None: ...

    clean.setattr(MoELayer, "__init__", traced)
    assert megatron_ep_v2.install(buffer="reference")["experts"] == "megatron"
    report = attempt(lambda: megatron_ep_v2.install(buffer="reference", experts="grouped"))
    assert_report(report, SeamError, "MoELayer.__init__", "its parameters are (args, kwargs)")
    assert MoELayer.__init__ is traced


@in_this_process
def test_a_kept_constructor_builds_todays_experts(clean: pytest.MonkeyPatch) -> None:
    """A later wrapper of MoELayer.__init__ holds on to what `install()` had bound, past `uninstall()`."""
    given: list[Any] = []
    clean.setattr(MoELayer, "__init__", lambda self, config, submodules=None, layer_number=None, pg_collection=None: (
        given.append(submodules.experts)
    ))  # fmt: skip
    megatron_ep_v2.install(buffer="reference", experts="sequential")
    kept = MoELayer.__init__
    layer = MoELayer.__new__(MoELayer)
    for experts, wanted in (("sequential", EXPERTS["sequential"]), ("grouped", GroupedExperts), (None, SequentialMLP)):
        megatron_ep_v2.uninstall()
        if experts:
            megatron_ep_v2.install(buffer="reference", experts=experts)
        kept(layer, config(), MoESubmodules(experts=SequentialMLP))
        assert given[-1] is wanted
