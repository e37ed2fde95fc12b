"""Experts chosen by a setting in Megatron's own training: its DDP, distributed optimizer and clipping, against its
SequentialMLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ep_v2.megatron.experts import Experts, StackedLinear
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups
from tests.helpers.megatron_training import Job, Setup, on_cpu
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
                max(abs(mine[0] - other[0]) for mine, other in zip(steps, theirs, strict=True)),
                max(abs(mine[1] - other[1]) for mine, other in zip(steps, theirs, strict=True)),
                max(float((weights[name] - tensor).abs().max()) for name, tensor in wanted.items()),
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
                assert max(loss, norm, weight) < 1e-5, f"{setup}: loss {loss:.1e}, norm {norm:.1e}, weight {weight:.1e}"


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
