"""AdamW on fp32 masters, with explicit gradient reduction for expert-parallel ranks that are data-parallel ranks too.

Losses are divided by the tokens of the global batch, so gradients only ever add up: those of dense parameters over all
ranks, in one collective; those of experts have done so already, in the backward of the dispatch (each expert lives on
one rank and has seen the tokens of all).
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias, TypedDict

import torch
import torch.distributed as dist

from megatron_ep_v2.megatron.qwen3_moe.options import Recipe

# A Parameter with two attributes of Megatron's: `main_grad`, and whether a gradient is in it already.
Collected: TypeAlias = Any
_PIECE = 2**26  # elements


class OptimizerState(TypedDict):
    """What goes into a checkpoint: masters by parameter name, and torch's own state."""

    masters: dict[str, torch.Tensor]
    adamw: dict[str, Any]


def collect_gradient(parameter: Collected, into: torch.Tensor) -> None:
    """Add a parameter's gradients up in an fp32 tensor of its shape, micro-batch after micro-batch.

    As in Megatron's own data parallelism: a module that fuses this with its GEMM adds to `main_grad` by itself and says
    so in `grad_added_to_main_grad`; autograd gets something of the right shape that is not read, or nothing. Where
    `overwrite_main_grad` is set, which such a module reads too, the next gradient replaces what is there.
    """
    parameter.main_grad, parameter.grad_added_to_main_grad = into, False
    parameter.overwrite_main_grad = False
    parameter.register_post_accumulate_grad_hook(_collect)


def _collect(parameter: Collected) -> None:
    assert parameter.grad is not None  # the hook runs after its accumulation
    if not parameter.grad_added_to_main_grad:
        if parameter.overwrite_main_grad:
            parameter.main_grad.copy_(parameter.grad)
        else:
            parameter.main_grad.add_(parameter.grad)
    parameter.grad_added_to_main_grad = False  # set again in each backward
    parameter.overwrite_main_grad = False
    parameter.grad = None


class FlatGradients:
    """fp32 gradients of several parameters as views of one buffer.

    Attributes:
        replaced: A step's first gradients replace those of the step before, which then need not be zeroed. For
            parameters whose modules know `overwrite_main_grad` or leave their gradients to autograd.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], device: torch.device):
        sizes = [p.numel() for p in parameters.values()]
        self.buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        views = self.buffer.split(sizes)
        self.by_name = {name: view.view_as(p) for (name, p), view in zip(parameters.items(), views, strict=True)}
        self._parameters: list[Collected] = list(parameters.values())
        self.replaced = False
        for name, parameter in parameters.items():
            collect_gradient(parameter, self.by_name[name])

    def zero(self) -> None:
        """Begin a step; `complete` ends it."""
        if not self.replaced:
            self.buffer.zero_()
        for parameter in self._parameters:  # where autograd has got nothing, no hook has done it
            parameter.grad, parameter.grad_added_to_main_grad = None, False
            parameter.overwrite_main_grad = self.replaced

    def complete(self) -> None:
        """Zero the gradients of parameters that have had none since `zero`."""
        for parameter in self._parameters:
            if parameter.overwrite_main_grad:
                parameter.main_grad.zero_()

    def square_sum(self) -> torch.Tensor:
        """fp64, by pieces: where torch widens its input, it makes a copy. On GPUs, norms of pieces are fp32."""
        widened = torch.float64 if self.buffer.device.type == "cpu" else None
        norms = [torch.linalg.vector_norm(piece, dtype=widened) for piece in self.buffer.split(_PIECE)]
        return torch.stack(norms).double().square().sum()


class Gradients:
    """Of one rank's parameters.

    Attributes:
        by_name: By parameter name, fp32. Complete after `reduce`; the optimizer scales them by the clipping.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], device: torch.device):
        dense = {n: p for n, p in parameters.items() if ".experts." not in n}
        experts = {n: p for n, p in parameters.items() if n not in dense}
        self.dense, self.experts = FlatGradients(dense, device), FlatGradients(experts, device)
        self.by_name = {**self.dense.by_name, **self.experts.by_name}

    def zero(self) -> None:
        self.dense.zero()
        self.experts.zero()

    def reduce(self) -> None:
        """Add up the dense gradients of all ranks."""
        self.dense.complete()
        self.experts.complete()
        dist.all_reduce(self.dense.buffer)


class Optimizer:
    """Owns the fp32 masters of one rank's parameters."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], gradients: Gradients, recipe: Recipe):
        self.parameters, self.gradients = parameters, gradients
        self.grad_clip = recipe.grad_clip
        # An fp32 parameter is its own master.
        self.masters = {
            n: p.detach() if p.dtype == torch.float32 else p.detach().float() for n, p in parameters.items()
        }
        for name, master in self.masters.items():
            master.grad = gradients.by_name[name]
        groups = [
            {"params": [m for m in self.masters.values() if m.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [m for m in self.masters.values() if m.dim() == 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(recipe.adam_beta1, recipe.adam_beta2), eps=1e-8, fused=True)

    @torch.no_grad()
    def step(self, lr: float, grad_norm: float) -> None:
        """Clip by the global norm, update the masters, round them to the parameters."""
        # AdamW's fused kernel divides by it, and writes the gradients back so: no pass over them of its own.
        self.adamw.grad_scale = None  # type: ignore[attr-defined]
        if self.grad_clip and grad_norm > self.grad_clip:
            device = self.gradients.dense.buffer.device
            too_large = grad_norm / self.grad_clip
            self.adamw.grad_scale = torch.full((), too_large, device=device)  # type: ignore[attr-defined]
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self._masters_to_parameters()

    def state_dict(self) -> OptimizerState:
        return {"masters": self.masters, "adamw": self.adamw.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: OptimizerState) -> None:
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        self.adamw.load_state_dict(state["adamw"])
        self._masters_to_parameters()

    def _masters_to_parameters(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                parameter.copy_(self.masters[name])


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of step 1, 2, ...: linear warm-up, then a cosine down to `min_lr` at the last step."""
    if step <= recipe.warmup_steps:
        return recipe.lr * step / recipe.warmup_steps
    progress = min(1.0, (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps))
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * progress))
