"""`install(experts=...)`: what these experts are not is refused by name before a layer is built, and so is whatever
would take them for Megatron's own."""

from __future__ import annotations

import functools
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import optimizer
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.optimizer import OptimizerConfig, muon
from megatron.core.resharding import planner
from megatron.core.resharding import utils as resharding
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_ep_v2
from megatron_ep_v2.errors import SettingsError, UnavailableError
from megatron_ep_v2.experts import gemm
from megatron_ep_v2.megatron import binding
from megatron_ep_v2.megatron.experts import _NEEDED, GroupedExperts
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.megatron_names import clean, names, rebound, set_cuda, set_deep_ep
from tests.helpers.reports import assert_report, attempt
from tests.megatron.test_experts_install import build, config, in_this_process

__all__ = ["clean"]  # a fixture

BRIDGE = "megatron.bridge.models.conversion.model_bridge"
HAS_MUON_MODULE = hasattr(muon, "_get_param_groups")  # before 0.18


class Group:
    """Stands for a process group of this size."""

    def __init__(self, size: int = 1):
        self.size, self.rank = (lambda: size), (lambda: 0)


def experts(changed: dict[str, Any] | None = None, tensor_parallel: int = 1) -> GroupedExperts:
    """Four experts, from a configuration with fields changed after Megatron has accepted it."""
    wanted = config()
    for name, value in (changed or {}).items():
        setattr(wanted, name, value)
    groups = SimpleNamespace(ep=Group(), expt_dp=Group(), expt_tp=Group(tensor_parallel))
    return GroupedExperts(4, wanted, pg_collection=groups)


# ------------------------------------------------------------------------------------- configurations of other experts


# Fields of TransformerConfig in some version, and a value that these experts do not have.
OTHERS: dict[str, Any] = {
    "gated_linear_unit": False,
    "activation_func": F.gelu,
    "activation_func_clamp_value": 7.0,
    "glu_linear_offset": 1.0,
    "use_te_activation_func": True,
    "activation_func_fp8_input_store": True,
    "add_bias_linear": True,
    "fp8": "hybrid",
    "fp4": "e2m1",
    "quant_recipe": "a recipe",
    "use_kitchen": True,
    "batch_invariant_mode": True,
    "moe_apply_probs_on_input": True,
    "moe_latent_size": 16,
    "moe_mlp_glu_interleave_size": 32,
    "moe_paged_stash": True,
    "moe_ncclep_zero_copy": True,
    "moe_dispatch_fwd_dtype": "fp8",
    "moe_combine_bwd_dtype": "fp8",
    "use_transformer_engine_op_fuser": True,
    "expert_gtp_weight_remat_size": 2,
    "cpu_offloading_weights": True,
    "init_model_with_meta_device": True,
}
FIELDS = [name for name in OTHERS if name in TransformerConfig.__dataclass_fields__]


@in_this_process
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_other_experts_is_refused_by_name(name: str) -> None:
    value = OTHERS[name]
    changed = {name: value}
    if name == "cpu_offloading_weights":
        assert experts(changed), "Megatron reads it with cpu_offloading alone"
        changed["cpu_offloading"] = True
    report = attempt(lambda: experts(changed))
    assert_report(report, SettingsError, f"found: {name}={value}\n", f"needed: {name}=", "experts=megatron")


@in_this_process
def test_every_field_that_matters_is_tried() -> None:
    assert OTHERS.keys() == _NEEDED.keys() and len(FIELDS) >= 16
    output, bias = experts()(torch.zeros(3, 64), torch.tensor([1, 0, 2, 0]), torch.ones(3))
    assert output.shape == (3, 64) and bias is None, "the configuration that the others differ from"


@in_this_process
def test_delayed_weight_gradients_that_were_not_asked_for_are_noticed() -> None:
    """A loop of its own that does not call backward_dw() would train without them."""
    ours = experts({"delay_wgrad_compute": True})
    rows = torch.ones(3, 64, requires_grad=True), torch.tensor([1, 0, 2, 0]), torch.ones(3)
    ours(*rows)[0].sum().backward()
    assert ours.linear_fc1.weight.grad is None and rows[0].grad is not None
    assert_report(attempt(lambda: ours(*rows)), SettingsError, "delay_wgrad_compute", "backward_dw()")
    ours.backward_dw()
    assert ours.linear_fc1.weight.grad is not None and ours.linear_fc2.weight.grad is not None
    ours(*rows)


@in_this_process
@pytest.mark.parametrize("module", ["expert_fc1", "moe_act", "fused_group_mlp"])
def test_offloading_the_experts_own_activations_is_refused(module: str) -> None:
    offload = {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn", module]}
    assert_report(attempt(lambda: experts(offload)), SettingsError, f"offload_modules=['{module}']")
    assert experts({**offload, "fine_grained_activation_offloading": False})


@in_this_process
def test_offloading_of_attention_is_none_of_theirs() -> None:
    attention = ["core_attn", "attn_proj", "qkv_linear", "attn_norm", "mlp_norm"]
    assert experts({"fine_grained_activation_offloading": True, "offload_modules": attention})


@in_this_process
def test_experts_split_over_ranks_are_refused() -> None:
    report = attempt(lambda: experts(tensor_parallel=2))
    assert_report(report, SettingsError, "expert_tensor_parallel_size=2", "expert_tensor_parallel_size=1")


@in_this_process
@pytest.mark.parametrize("linear", ["linear_fc1", "linear_fc2"])
def test_weights_of_megatron_fsdp_are_refused_at_their_first_forward(linear: str) -> None:
    ours = experts()
    getattr(ours, linear).weight.__fsdp_param__ = True
    report = attempt(lambda: ours(torch.zeros(3, 64), torch.tensor([1, 0, 2, 0]), torch.ones(3)))
    assert_report(report, SettingsError, "use_megatron_fsdp", "experts=megatron")


def for_inference(group: Any) -> list[Any]:
    """With Megatron's spec for it, where there is one; and with a plain spec."""
    from megatron.core.models.gpt import moe_module_specs

    make = getattr(moe_module_specs, "get_inference_optimized_moe_spec", None)
    plain = get_moe_module_spec(use_te=False, num_experts=8)
    with process_groups():
        megatron_ep_v2.install(buffer="reference", experts="grouped")
        reports = []
        for spec in (plain, make() if make else plain):
            wanted = config()
            wanted.transformer_impl = "inference_optimized"
            reports.append(attempt(lambda spec=spec, wanted=wanted: build(spec, wanted)))
        return reports


def test_layers_for_inference_are_refused() -> None:
    """Megatron's own checks of what is installed for that come later, or their errors would be the ones seen."""
    for reports in run_ranks(2, for_inference):
        for report in reports:
            assert report is not None and "transformer_impl=inference_optimized" in report.text
            assert report.kind == "SettingsError" and "local or transformer_engine" in report.text


# ---------------------------------------------------------------------- experts of another class, or that cannot be had


class Custom(SequentialMLP):
    """Not Megatron's, though made of it."""


@in_this_process
@pytest.mark.parametrize(
    "theirs",
    [Custom, ModuleSpec(module=Custom), functools.partial(Custom), functools.partial(functools.partial(Custom))],
    ids=["class", "spec", "partial", "partial of one"],
)
def test_experts_of_another_class_are_refused_before_anything_is_built(theirs: Any) -> None:
    submodules = MoESubmodules(experts=theirs)
    megatron_ep_v2.install(experts="grouped")
    for call in (lambda: MoELayer(config(), submodules), lambda: MoELayer(config(), submodules=submodules)):
        report = attempt(call)
        assert_report(
            report, SettingsError, "experts=grouped", "MoESubmodules.experts is", "Custom", "experts=megatron"
        )
    assert submodules.experts is theirs


def torch_without_grouped_gemm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gemm, "_grouped_mm", gemm._grouped_mm.__wrapped__)
    patch.delattr(F, "grouped_mm", raising=False)
    patch.delattr(torch, "_grouped_mm", raising=False)


def old_gpu(patch: pytest.MonkeyPatch) -> None:
    set_cuda(patch, True)
    set_deep_ep(patch, "Buffer")
    patch.setattr(gemm, "_capability", lambda *_: (8, 0))  # which is asked for once in a process


def deep_gemm_on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gemm, "deep_gemm", lambda: None)


@in_this_process
@pytest.mark.parametrize(
    ("settings", "machine", "error", "parts"),
    [
        ({"experts": "deepgemm"}, None, UnavailableError, ["DeepGEMM", "choose the grouped experts"]),
        ({"experts": "deepgemm"}, deep_gemm_on_a_cpu, UnavailableError, ["multiplies on GPUs only", "cpu"]),
        ({"experts": "grouped"}, torch_without_grouped_gemm, UnavailableError, ["no grouped GEMM", torch.__version__]),
        ({"experts": "grouped"}, old_gpu, UnavailableError, ["no grouped GEMM for this GPU", "(8, 0)"]),
        (
            {"experts": "fast"},
            None,
            SettingsError,
            ["'fast' from install()", "megatron, grouped, deepgemm, sequential"],
        ),
        (
            {"experts": "sequential", "sync_free": True},
            None,
            SettingsError,
            ["experts=sequential from install()", "sync_free from install()", "MCORE_DEEPEP_V2_EXPERTS=grouped"],
        ),
    ],
    ids=["no DeepGEMM", "DeepGEMM, no GPU", "old torch", "old GPU", "unknown", "sync-free"],
)
def test_experts_that_cannot_be_had_bind_nothing(
    settings: dict[str, Any], machine: Any, error: Any, parts: list[str], clean: pytest.MonkeyPatch
) -> None:
    if machine:
        machine(clean)
    before = names()
    assert_report(attempt(lambda: megatron_ep_v2.install(**settings)), error, *parts)
    assert not rebound(before) and megatron_ep_v2.status()["installed"] is False


# ------------------------------------------------------------------------- code that would take them for Megatron's own


class Model(torch.nn.Module):
    """A model of Megatron's whose experts are these, or others."""

    def __init__(self, stacked: bool):
        super().__init__()
        self.config = config()
        self.norm, self.experts = torch.nn.LayerNorm(4), experts() if stacked else torch.nn.Linear(4, 4)


class ReachedError(Exception):
    """Megatron's own function was called."""


def reached(*_: Any, **__: Any) -> None:
    raise ReachedError


@in_this_process
@pytest.mark.parametrize("name", ["muon", "dist_muon"])
def test_muon_is_refused(name: str, clean: pytest.MonkeyPatch) -> None:
    if HAS_MUON_MODULE:
        clean.setattr(muon, "HAVE_EMERGING_OPTIMIZERS", True)
        clean.setattr(muon, "_get_param_groups", reached)

        def ask(model: Model) -> None:
            layerwise = name == "dist_muon"
            muon.get_megatron_muon_optimizer(
                OptimizerConfig(optimizer=name, lr=0.1), [model], None, True, layerwise, pg_collection=object()
            )
    else:
        clean.setattr(optimizer, "_get_megatron_emerging_optimizer", reached)

        def ask(model: Model) -> None:
            optimizer.get_megatron_optimizer(OptimizerConfig(optimizer=name, lr=0.1), [model])

    with pytest.raises(ReachedError):
        ask(Model(True))
    megatron_ep_v2.install(experts="grouped")
    report = attempt(lambda: ask(Model(True)))
    assert_report(report, SettingsError, "stacked experts", "muon", "Adam or SGD", "--optimizer adam")
    with pytest.raises(ReachedError):
        ask(Model(False))
    megatron_ep_v2.uninstall()
    with pytest.raises(ReachedError):
        ask(Model(True))


@in_this_process
@pytest.mark.parametrize("module", [planner, resharding], ids=["planner", "utils"])
def test_a_refit_is_refused(module: Any, clean: pytest.MonkeyPatch) -> None:
    clean.setattr(module, "extract_param_metadata", reached)
    megatron_ep_v2.install(experts="grouped")
    stacked, plain = experts().linear_fc1.weight, torch.nn.Linear(4, 4).weight
    for call in (
        lambda: module.extract_param_metadata(stacked, "experts.linear_fc1.weight", 0, None, num_experts=8),
        lambda: module.extract_param_metadata(param=stacked, param_name="", owner_rank=0, pg_collection=None),
    ):
        assert_report(
            attempt(call), SettingsError, "a refit", "one parameter for each expert", "checkpoints fit either"
        )
    with pytest.raises(ReachedError):
        module.extract_param_metadata(plain, "weight", 0, None)


def bridged(group: Any) -> tuple[list[bool], list[Any]]:
    """Whether the stand-in's function is its own: imported, after a layer was built, after a second, after uninstall().
    And what it says to a stacked model and to another one."""

    class MegatronModelBridge:
        def build_conversion_tasks(self, hf: Any, megatron_model: Any) -> list[str]:
            return ["a task"]

    theirs = MegatronModelBridge.build_conversion_tasks
    stand_in: Any = ModuleType(BRIDGE)
    stand_in.MegatronModelBridge = MegatronModelBridge
    own, said = [], []

    def look() -> None:
        own.append(vars(MegatronModelBridge)["build_conversion_tasks"] is theirs)

    with process_groups(), pytest.MonkeyPatch.context() as patch:
        megatron_ep_v2.install(buffer="reference", experts="grouped")
        patch.setitem(sys.modules, BRIDGE, stand_in)
        look()
        for _ in range(2):
            layer = build(get_moe_module_spec(use_te=False, num_experts=8), config())
            look()
        bridge = MegatronModelBridge()
        said.append(attempt(lambda: bridge.build_conversion_tasks(None, [layer])))
        said.append(attempt(lambda: bridge.build_conversion_tasks(None, megatron_model=layer)))
        said.append(bridge.build_conversion_tasks(None, [torch.nn.Linear(4, 4)]))
        bound = [name for owner, name, _, _ in binding.bound() if owner is MegatronModelBridge]
        megatron_ep_v2.uninstall()
        look()
        said.append(bridge.build_conversion_tasks(None, [layer]))
    return own, [*said, bound]


def test_a_bridge_that_is_imported_after_install_is_guarded_from_the_next_layer_on() -> None:
    for own, (positional, keyword, others, undone, bound) in run_ranks(2, bridged):
        assert own == [True, False, False, True]
        for report in (positional, keyword):
            assert_report(report, SettingsError, "Megatron-Bridge", "Hugging Face", "one parameter for each expert")
        assert others == undone == ["a task"] and bound == ["build_conversion_tasks"], "bound once"
