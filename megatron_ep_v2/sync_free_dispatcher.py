"""The communication manager of Megatron-Core's flex dispatcher without a wait on the host.

As `dispatcher.ExpandedManager`, rows arrive sorted by local expert and nothing is left for Megatron to permute. But
`tokens_per_expert` stays on the device: experts that ask for it as a list (TEGroupedMLP, SequentialMLP) wait for it.
"""

from __future__ import annotations

import torch

from megatron_ep_v2.dispatcher import ExpandedManager
from megatron_ep_v2.sync_free import SyncFreeHandle, sync_free_combine, sync_free_dispatch


class SyncFreeManager(ExpandedManager):
    """`_DeepepManager` on `sync_free`. Megatron's stream arguments change nothing, as `fused_a2a` explains."""

    handle: SyncFreeHandle | None

    def dispatch(
        self, hidden_states: torch.Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> torch.Tensor:
        """Send [T, H]; receive [M, H] sorted by local expert, zero on padding.

        Sets `dispatched_probs` [M] fp32, `tokens_per_expert` [L] int32 on the device, and `handle` for the combine.
        """
        self.token_probs = self._probs_in_fp32()
        hidden_states, self.dispatched_probs, self.tokens_per_expert, self.handle = sync_free_dispatch(
            hidden_states,
            self.token_indices,
            self.token_probs,
            self.num_experts,
            self.group,
            expert_alignment=self._expert_alignment(),
        )
        self.load.add(self.handle.places.counts)
        return hidden_states

    def combine(
        self, hidden_states: torch.Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> torch.Tensor:
        """Send [M, H] back; receive [T, H]."""
        assert self.handle is not None  # of the dispatch
        combined = sync_free_combine(hidden_states, self.group, self.handle)
        self.handle = self.dispatched_probs = None  # type: ignore[assignment]  # as Megatron's own does
        return combined
