"""The linears of these experts as a module, and the weight gradients that their backwards leave for later.

With Megatron's `delay_wgrad_compute` a backward computes no weight gradient: `Experts.backward_dw` does, when Megatron
asks for it. After an error in between some are left. They go when gradients are zeroed, and until then no step is
taken without them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.experts import redundant
from megatron_ep_v2.experts.gemm import Gemm
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import linear
from megatron_ep_v2.experts.redundant import ReplicaRows
from megatron_ep_v2.megatron.expert_checkpoint import drop_extra_states


class StackedLinear(torch.nn.Module):
    """Linears of all experts of a rank, stacked: weight [L, out, in], no bias.

    The weight carries Megatron's marks: `allreduce=False`, because its gradient is not summed over all ranks (at expert
    parallel size 1 it is, and Megatron treats its own experts as dense parameters, so these too);
    `tensor_model_parallel`, because each rank of the tensor-parallel group has different experts, which all count in
    the gradient's norm (megatron-core 0.16 skips what it takes for copies on all ranks but the first; 0.19 does not).
    And this package's mark `stacked_experts`, by which checkpoints distinguish it from Megatron's experts.

    Attributes:
        delayed: Weight gradients that backwards have left for `Experts.backward_dw` (`mlp.linear`).
    """

    def __init__(self, config: TransformerConfig, num_local_experts: int, out_features: int, in_features: int):
        super().__init__()
        # None as in Megatron's own linears: the CPU, unless the caller builds on another device ("meta").
        device = None if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
        shape = (num_local_experts, out_features, in_features)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        # ETP is 1 here
        self._own_groups = config.expert_model_parallel_size > 1 or config.tensor_model_parallel_size > 1
        self._mark()
        self.fuse_wgrad_accumulation = config.gradient_accumulation_fusion
        self.delayed: list[torch.Tensor] = []
        self._delays = config.delay_wgrad_compute
        _stacked.add(self)
        _hook_into_optimizers()
        self._drawn_alike = config.use_cpu_initialization  # on the CPU, where all ranks have one random state
        self._register_load_state_dict_pre_hook(drop_extra_states, with_module=True)

    def _mark(self) -> None:
        self.weight.allreduce = not self._own_groups  # type: ignore[attr-defined]
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.stacked_experts = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StackedLinear:
        """Mark the weight again: torch creates a new parameter when one leaves the device "meta"."""
        super()._apply(fn, recurse)
        self._mark()
        return self

    def __setstate__(self, state: dict[str, object]) -> None:
        """Mark the weight of a copy: torch copies a parameter without its attributes."""
        super().__setstate__(state)
        self._mark()
        _stacked.add(self)

    def forward(
        self,
        x: torch.Tensor | None,
        groups: Groups | ReplicaRows | None = None,
        multiply: Gemm | None = None,
        last: bool = False,
        activation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """See `mlp.linear`, and `redundant.linear` with replicas. Called as a module, so that forward pre-hooks run:
        DDP gathers the weight in one. Without rows, only these run, and the weight is returned."""
        if hasattr(self.weight, "__fsdp_param__"):
            raise SettingsError(
                "stacked experts do not run under Megatron-FSDP",
                found="use_megatron_fsdp",
                needed="Megatron's DistributedDataParallel",
                fix="drop --use-megatron-fsdp, or leave Megatron's own experts in place (experts=megatron)",
            )
        if x is None or groups is None or multiply is None:
            return self.weight
        if self.delayed and torch.is_grad_enabled():  # an evaluation adds to no gradient
            raise _left("the next forward")
        main_grad = getattr(self.weight, "main_grad", None) if self.fuse_wgrad_accumulation else None
        if isinstance(groups, ReplicaRows):
            return redundant.linear(x, self.weight, groups, multiply, activation, main_grad)
        delayed = self.delayed if self._delays else None
        return linear(x, self.weight, groups, multiply, last, activation, main_grad, delayed)

    @torch.no_grad()
    def initialize(self, method: Callable[[torch.Tensor], object], first: int, number: int) -> None:
        """Initialize each expert separately. If all ranks draw the same random numbers, skip those of other experts."""
        for expert in range(number) if self._drawn_alike else range(first, first + len(self.weight)):
            here = 0 <= expert - first < len(self.weight)
            method(self.weight[expert - first] if here else torch.empty_like(self.weight[0]))


_stacked: weakref.WeakSet[StackedLinear] = weakref.WeakSet()  # that are alive


def drop_delayed(model: torch.nn.Module) -> None:
    """Drop the weight gradients that backwards of a model have left for `backward_dw()`: those of a step that was given
    up, whose gradients are zeroed. `zero_grad_buffer()` of Megatron's DDP calls this."""
    if any(linear.delayed for linear in _stacked):
        for module in model.modules():
            if isinstance(module, StackedLinear):
                module.delayed.clear()


def dropping_delayed(zero_grad_buffer: Callable[..., None]) -> Callable[..., None]:
    """Wrap `DistributedDataParallel.zero_grad_buffer` to zero the delayed gradients, too."""

    @functools.wraps(zero_grad_buffer)
    def zero(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        drop_delayed(self)
        zero_grad_buffer(self, *args, **kwargs)

    return zero


@functools.cache
def _hook_into_optimizers() -> None:
    """Register the hook once."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(*_: object) -> None:
    """Before any optimizer's step, which would lose delayed gradients. No schedule leaves some at its end."""
    if any(linear.delayed for linear in _stacked):
        raise _left("an optimizer's step")


def _left(before: str) -> SettingsError:
    return SettingsError(
        f"weight gradients were left for backward_dw(), which was not called before {before}",
        found="delay_wgrad_compute=True; a loop that does not call it, or an error before the call",
        needed="Megatron's 1F1B plan, which calls it; after an error, gradients that are zeroed before the next step",
        fix="after an error: zero_grad_buffer() of Megatron's DistributedDataParallel, or, without that, "
        "megatron_ep_v2.megatron.stacked_linear.drop_delayed(model). Else drop --delay-wgrad-compute, or call "
        "backward_dw() of the MoE layers after each backward",
    )
