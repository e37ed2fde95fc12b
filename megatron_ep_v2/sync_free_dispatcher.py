"""The communication manager of Megatron-Core's flex dispatcher without a wait on the host.

As `dispatcher.ExpandedManager`, rows arrive sorted by local expert and nothing is left for Megatron to permute. But
`tokens_per_expert` stays on the device: experts that want it as a list (TEGroupedMLP, SequentialMLP) would wait for it.
Those of `megatron_ep_v2.experts` do not.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_ep_v2.dispatcher import ExpandedManager
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.sync_free import SyncFreeHandle, sync_free_combine, sync_free_dispatch


class CountsOnDevice(torch.Tensor):
    """Counts that do not come to the host. What is computed from them are ordinary tensors.

    Attributes:
        alignment: Each is a multiple of this, so that experts which want padded rows can tell that they have them.
    """

    alignment: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> CountsOnDevice:
        """For a copy of the layer; torch copies tensors only whose operations give the subclass."""
        copied = self.clone().as_subclass(CountsOnDevice)
        copied.alignment = self.alignment
        return copied

    def tolist(self) -> Any:
        """What Megatron's own experts ask for."""
        raise SettingsError(
            "these experts want tokens_per_expert on the host, where sync-free mode does not bring it",
            found="a call of tokens_per_expert.tolist(), as in TEGroupedMLP and SequentialMLP",
            needed="experts that take the counts on the device",
            fix="set MCORE_DEEPEP_V2_EXPERTS=grouped before the model is built, or leave MCORE_DEEPEP_V2_SYNC_FREE off",
        )


class SyncFreeManager(ExpandedManager):
    """`_DeepepManager` on `sync_free`. Megatron's stream arguments change nothing, as `fused_a2a` explains."""

    handle: SyncFreeHandle | None

    def dispatch(
        self, hidden_states: torch.Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> torch.Tensor:
        """Send [T, H]; receive [M, H] sorted by local expert, zero on padding.

        Sets `dispatched_probs` [M] fp32, `tokens_per_expert` [L] int32 on the device, and `handle` for the combine.

        Raises:
            EPError: See `CompactManager.dispatch` and `sync_free_dispatch`.
        """
        self._check_installed()
        self.token_probs = self._probs_in_fp32()
        hidden_states, self.dispatched_probs, counts, self.handle = sync_free_dispatch(
            hidden_states,
            self.token_indices,
            self.token_probs,
            self.num_experts,
            self.group,
            expert_alignment=self._expert_alignment(),
        )
        on_device = counts.as_subclass(CountsOnDevice)
        on_device.alignment = self.handle.places.alignment
        self.tokens_per_expert = on_device
        self.load.add(self.handle.places.counts)
        return hidden_states

    def combine(
        self, hidden_states: torch.Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> torch.Tensor:
        """Send [M, H] back; receive [T, H]."""
        self._check_installed()
        assert self.handle is not None  # of the dispatch
        combined = sync_free_combine(hidden_states, self.group, self.handle)
        self._forget()
        return combined
