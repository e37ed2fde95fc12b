"""Experts chosen by a setting in Megatron's own training: its DDP, distributed optimizer and clipping, against its
SequentialMLP."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_ep_v2.megatron.experts import Experts
from megatron_ep_v2.megatron.overlap import WGRAD
from megatron_ep_v2.megatron.stacked_linear import StackedLinear
from tests.helpers.compare import worst
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups
from tests.helpers.megatron_training import Job, Setup, on_cpu
from tests.helpers.one_memory import in_one_memory
from tests.helpers.shapes import CPU, Split

STEPS = 5
OURS = (Setup(experts="grouped"), Setup(experts="grouped", fusion=True), Setup(experts="sequential", fusion=True))


def train(setup: Setup) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], Job]:
    """Losses and gradient norms; all weights."""
    job = Job(setup)
    return [job.step() for _ in range(STEPS)], job.weights(), job


def differences(group: Any, overlap: bool) -> dict[str, tuple[float, float, float]]:
    """Setup -> largest difference of loss, of norm and of a weight to Megatron's experts, with EP 2 x expert data
    parallel 2. "passed by": the linears are not called as modules, so that no hook of theirs runs, as in
    code that does not call the module that owns the weights."""
    found = {}
    with on_cpu(), process_groups(Split(1, 2)), pytest.MonkeyPatch.context() as patch:
        theirs, wanted, _ = train(Setup(overlap=overlap))
        assert len({round(norm, 3) for _, norm in theirs}) == STEPS and max(norm for _, norm in theirs) > 0.5, "clipped"
        jobs = {f"{ours.experts}, fusion={ours.fusion}": ours for ours in OURS[: 3 if overlap else 2]}
        for name, ours in (jobs | {"passed by": OURS[0]} if overlap else jobs).items():
            if name == "passed by":
                patch.setattr(StackedLinear, "__call__", StackedLinear.forward)
            steps, weights, job = train(replace(ours, overlap=overlap))
            assert any(isinstance(module, Experts) for module in job.model.modules())
            for parameter in job.model.parameters():
                if getattr(parameter, "stacked_experts", False):
                    assert parameter.grad_added_to_main_grad == ours.fusion and parameter.grad is None
            assert weights.keys() == wanted.keys()
            found[name] = (
                worst(abs(mine[0] - other[0]) for mine, other in zip(steps, theirs, strict=True)),
                worst(abs(mine[1] - other[1]) for mine, other in zip(steps, theirs, strict=True)),
                worst(float((weights[name] - tensor).abs().max()) for name, tensor in wanted.items()),
            )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_training_is_that_of_megatrons_experts(overlap: bool) -> None:
    """2 micro-batches, clipping, AdamW; gradients reduced and parameters gathered during compute, or not. The control:
    weights that are not gathered would be seen."""
    for by_setup in run_ranks(4, differences, overlap):
        assert len(by_setup) == (4 if overlap else 2)
        for setup, (loss, norm, weight) in by_setup.items():
            if setup == "passed by":
                assert norm > 1e-4 and weight > 1e-4
            else:
                assert worst([loss, norm, weight]) < 1e-5, (
                    f"{setup}: loss {loss:.1e}, norm {norm:.1e}, weight {weight:.1e}"
                )


def delay(experts: list[Experts], patch: pytest.MonkeyPatch) -> None:
    """Ask for the weight gradients when a backward has ended, as Megatron's 1F1B plan does."""
    theirs = torch.Tensor.backward

    def backward(loss: torch.Tensor, *args: Any, **more: Any) -> None:
        theirs(loss, *args, **more)
        for each in reversed(experts):
            each.backward_dw()

    patch.setattr(torch.Tensor, "backward", backward)
    for linear in (linear for each in experts for linear in (each.linear_fc1, each.linear_fc2)):
        linear._delays = True


def of_their_own(group: Any) -> dict[str, bool]:
    """How weight gradients are computed -> whether losses, norms and weights are those of the first way, bit by bit,
    where Megatron reduces gradients as soon as a parameter's hook has run. EP 2 x expert data parallel 2."""
    found, wanted = {}, None
    with on_cpu(), process_groups(Split(1, 2)), in_one_memory() as order:
        for way in ("at once", "next to the dispatch's backward", "delayed"):
            job = Job(Setup(experts="grouped", fusion=True, overlap=True))
            experts = [module for module in job.model.modules() if isinstance(module, Experts)]
            for layer in (module for module in job.model.modules() if isinstance(module, MoELayer)):
                manager: Any = layer.token_dispatcher._comm_manager
                manager.config = copy.copy(manager.config)
                setattr(manager.config, WGRAD, way.startswith("next"))
            order.clear()
            with pytest.MonkeyPatch.context() as patch:
                if way == "delayed":
                    delay(experts, patch)
                steps = [job.step() for _ in range(2)]
            result = steps, job.weights()
            if wanted is None:
                wanted = result
            assert ("combine starts" in order) == way.startswith("next")
            same = all(torch.equal(weight, wanted[1][name]) for name, weight in result[1].items())
            found[way] = same and steps == wanted[0] and steps[0] != steps[1]
    return found


@pytest.mark.slow
def test_weight_gradients_apart_from_the_rows_are_there_when_megatron_reduces_them() -> None:
    for found in run_ranks(4, of_their_own):
        assert len(found) == 3 and all(found.values()), found


def layers(group: Any) -> dict[str, list[float]]:
    """Losses and norms with what models add to a MoE layer."""
    found = {}
    cases: dict[str, dict[str, Any]] = {
        "moe_act recomputed": {
            "moe_grouped_gemm": True,
            "recompute_granularity": "selective",
            "recompute_modules": ["moe_act"],
        },
        "shared experts": {"moe_shared_expert_intermediate_size": 16},
    }
    with on_cpu(), process_groups(Split(1, 2)):
        for name, more in cases.items():
            base = {key: value for key, value in more.items() if not key.startswith(("recompute", "moe_grouped"))}
            theirs = Job(Setup(more=tuple(base.items()))).step()
            for fusion in (False, True):
                ours = Job(Setup(experts="grouped", fusion=fusion, more=tuple(more.items()))).step()
                found[f"{name}, fusion={fusion}"] = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return found


def test_shared_experts_and_a_recomputed_activation() -> None:
    for by_case in run_ranks(2, layers):
        assert len(by_case) == 4
        for case, (loss, norm) in by_case.items():
            assert loss < 1e-5 and norm < 1e-5, case


def kept(group: Any) -> dict[bool, int]:
    """Elements of the activation's shape that autograd keeps for a layer's backward, without and with recompute."""

    found = {}
    with process_groups():
        for recompute in (False, True):
            more = (
                {"moe_grouped_gemm": True, "recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
                if recompute
                else {}
            )
            layer = make_layer(CPU, "flex", experts="grouped", **more)
            saved: dict[int, int] = {}

            def pack(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
                if tensor.dim() == 2 and tensor.shape[1] == CPU.ffn:
                    saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = layer(hidden_states(CPU, CPU.tokens, 1))[0]
            found[recompute] = sum(saved.values())
            y.sum().backward()
    return found


def test_recompute_of_the_activation_keeps_none() -> None:
    for found in run_ranks(2, kept):
        assert found[True] == 0 < found[False]
