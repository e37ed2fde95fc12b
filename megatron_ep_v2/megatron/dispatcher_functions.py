"""Functions of Megatron around the managers, as `binding` replaces them: they hand over what a manager of this package
needs, and leave every other manager to Megatron's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.gradients import order
from megatron_ep_v2.megatron import managers
from megatron_ep_v2.started_a2a import finish_combine

_Preprocess: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def preprocess(theirs: _Preprocess) -> _Preprocess:
    """Replace `MoEFlexTokenDispatcher.dispatch_preprocess` by a shorter version for the managers of this package.

    Megatron compiles its own, once per layer until torch's limit of recompilations: seconds at the first step and
    guards at every later one, for reshapes and a top-k that compilation does not speed up. Without tensor parallelism
    the reshapes cancel out.
    """

    @functools.wraps(theirs)
    def dispatch_preprocess(
        self: token_dispatcher.MoEFlexTokenDispatcher,
        hidden_states: torch.Tensor,
        routing_map: torch.Tensor,
        probs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        manager = self._comm_manager
        if not isinstance(manager, managers.CompactManager):
            if type(manager) is managers.MegatronsManager:  # would call our functions, always with the compact layout
                raise SettingsError(
                    "this MoE layer was built before megatron_ep_v2.install()",
                    found=f"Megatron's own {type(manager).__name__}; installed: {managers.installed}",
                    needed="install() before the model is built",
                    fix="call install() earlier, or build the model again",
                )
            return theirs(self, hidden_states, routing_map, probs)
        self.hidden_shape = hidden_states.shape
        if self.tp_size > 1:
            routing_map, probs = self._initialize_metadata(routing_map, probs)
        manager.setup_metadata(routing_map, probs)
        return hidden_states.view(-1, self.hidden_shape[-1]), manager.token_probs

    return dispatch_preprocess


def postprocess(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Replace `MoEFlexTokenDispatcher.combine_postprocess` where the combine was only started: the shared expert's
    second linear is launched before its end is waited for."""

    @functools.wraps(theirs)
    def combine_postprocess(self: token_dispatcher.MoEFlexTokenDispatcher, hidden_states: torch.Tensor) -> torch.Tensor:
        manager = self._comm_manager
        started = manager.take_combine() if isinstance(manager, managers.ExpandedManager) else None
        if started is None:
            return theirs(self, hidden_states)
        shared = self.shared_experts
        if shared is not None:
            shared.linear_fc2_forward()
            shared.post_forward_comm()
        combined = finish_combine(started)
        order(combined, _FIRST)  # the backward begins with the communication, as Megatron's does
        if shared is not None:
            combined += shared.get_output()
        return combined.view(self.hidden_shape)

    return combine_postprocess


_FIRST = torch.iinfo(torch.int).max


def keep_rows(theirs: Callable[..., bool]) -> Callable[..., bool]:
    """Replace `should_free_input` of Megatron's 1F1B schedule, for rows that go to the experts without a copy.

    With backend "deepep" Megatron frees them once the experts have run, because its experts work on a permuted copy.
    Here experts may save the rows themselves for backward; in an FP8 model too, where some layers stay in bf16.
    """

    @functools.wraps(theirs)
    def should_free_input(name: str, is_moe: bool, config: TransformerConfig, *more: object, **named: object) -> bool:
        ours = config.moe_token_dispatcher_type == "flex" and config.moe_flex_dispatcher_backend == "deepep"
        return not (ours and name == "mlp") and theirs(name, is_moe, config, *more, **named)

    return should_free_input
