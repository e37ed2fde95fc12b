"""Kinds of experts in one model, on one set of weights and gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.experts.gemm import gemm
from megatron_ep_v2.megatron.experts import EXPERTS, Experts
from megatron_ep_v2.megatron.qwen3_moe.model import megatron_layer_spec, moe_submodules
from megatron_ep_v2.megatron.qwen3_moe.optimizer import collect_gradient
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer
from megatron_ep_v2.settings import environment

# Megatron's own experts: how the layer's configuration differs, and the environment that they need.
MEGATRON: dict[str, Mapping[str, object]] = {
    "megatron": {},
    "megatron-opfuser": {"use_transformer_engine_op_fuser": True},
}
_ENVIRONMENT: dict[str, Mapping[str, str]] = {"megatron-opfuser": {"NVTE_CUTEDSL_FUSED_GROUPED_MLP": "1"}}
_LINEARS = ("linear_fc1", "linear_fc2")


def owner(kinds: Sequence[str]) -> str:
    """Whose parameters the optimizer has. Megatron's own, one for each expert, where it is alone; else stacked ones, of
    which any kind's can be views. The sequential experts have them so and need nothing that a machine may lack."""
    return "megatron" if list(kinds) == ["megatron"] else "sequential"


class ExpertSet:
    """The experts of one kind, a module for each MoE layer.

    Their weights are the model's own, and so is where their gradients go: no second copy of either.

    Args:
        kind: One of `megatron_ep_v2.bench.variants.EXPERT_BACKENDS`.
        trainer: Of the model.
        owners: The experts that the model was built with, those of `owner`.

    Raises:
        EPError, ImportError, RuntimeError, AssertionError: They cannot run here.
    """

    def __init__(self, kind: str, trainer: Trainer, owners: Sequence[torch.nn.Module]):
        self.layers, self._variables = trainer.moe_layers, _ENVIRONMENT.get(kind, {})
        self._gradients = trainer.gradients.experts
        self._replaces = kind in EXPERTS
        self._entered = contextlib.ExitStack()
        self.modules: list[torch.nn.Module] = []
        with environment(**self._variables):
            for layer, own in zip(self.layers, owners, strict=True):
                if kind == trainer.options.experts:
                    self.modules.append(own)
                elif kind in EXPERTS:
                    self.modules.append(_stacked(kind, layer, own))
                else:
                    self.modules.append(_megatron(kind, trainer, layer, own))
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()  # of the weights that the modules were built with

    def enter(self) -> None:
        self._entered.enter_context(environment(**self._variables))
        self._gradients.replaced = self._replaces
        for layer, module in zip(self.layers, self.modules, strict=True):
            layer.experts = module

    def leave(self) -> None:
        self._gradients.replaced = False
        self._entered.close()


def _stacked(kind: str, layer: MoELayer, own: torch.nn.Module) -> Experts:
    """This package's, with the very parameters of `own`."""
    module = EXPERTS[kind](
        layer.num_local_experts, layer.config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    for name in _LINEARS:
        weight = getattr(own, name).weight
        gemm(kind).check(weight.new_empty(0, weight.shape[2]), weight)
        getattr(module, name).weight = weight
    return module


def _megatron(kind: str, trainer: Trainer, layer: MoELayer, own: torch.nn.Module) -> torch.nn.Module:
    """Megatron's, built as its MoELayer does; each expert's weights and gradients are views of those in `own`."""
    config = copy.copy(layer.config)
    for name, value in MEGATRON[kind].items():
        setattr(config, name, value)
    build = moe_submodules(megatron_layer_spec(trainer.options.shape, trainer.device)).experts
    arguments = {"config": config, "pg_collection": ProcessGroupCollection.use_mpu_process_groups()}
    if isinstance(build, ModuleSpec):  # from megatron-core 0.18 on something to call
        module = build_module(build, layer.num_local_experts, **arguments)
    else:
        module = build(layer.num_local_experts, **arguments)
    if MEGATRON[kind] and not getattr(module, "_with_fused_impl", False):
        raise UnavailableError(
            "Megatron's experts take no notice of the op fuser here",
            found=type(module).__name__,
            needed="TransformerEngine's grouped experts (on GPUs), and a megatron-core that fuses them",
            fix="measure it there",
        )
    for name in _LINEARS:
        stacked = getattr(own, name).weight
        parts = zip(stacked.detach().unbind(), stacked.main_grad.unbind(), strict=True)
        for weight, (values, gradient) in zip(one_by_one(module, name), parts, strict=True):
            weight.data = values
            collect_gradient(weight, gradient)
    return module


def one_by_one(experts: torch.nn.Module, linear: str) -> list[torch.nn.Parameter]:
    """A linear's weights [out, in] of each expert in SequentialMLP and TEGroupedMLP."""
    local: Iterable[torch.nn.Module] | None = getattr(experts, "local_experts", None)
    if local is not None:
        return [getattr(expert, linear).weight for expert in local]
    grouped = getattr(experts, linear)
    return [getattr(grouped, f"weight{i}") for i in range(grouped.num_gemms)]
