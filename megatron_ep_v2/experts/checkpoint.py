"""Stacked experts in Megatron's distributed checkpoints, which know each expert by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_ep_v2.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class ExpertShards:
    """Where a rank's experts stand among all, and how the checkpoint names them.

    Attributes:
        first: Global number of this rank's first expert.
        number: Experts of all ranks.
        offsets: Megatron's offsets of the axes that stand before the expert's.
        by_name: Each expert has a key of its own, gate and up each another one (Megatron's `singleton_local_shards`);
            else all are one tensor with an axis for experts.
    """

    first: int
    number: int
    offsets: tuple[Any, ...]
    by_name: bool

    def factory(
        self, prefix: str, name: str, weight: torch.Tensor, replica_id: tuple[int, int, int]
    ) -> ShardedTensorFactory:
        """What Megatron makes shards of one stacked weight with when it saves, and the weight of shards when it loads.

        Args:
            prefix: Of the experts' module.
            name: `linear_fc1` or `linear_fc2`.
            weight: [L, out, in].
            replica_id: (pipeline, tensor, expert data parallel); the replica of zeros writes.
        """
        halves = ("_w", "_v") if self.by_name and name == "linear_fc1" else ("",)

        def build(
            _key: str, stacked: torch.Tensor, replica: tuple[int, ...], flattened_range: slice | None
        ) -> list[ShardedTensor]:
            if flattened_range is not None:
                raise SettingsError(
                    "stacked experts cannot be saved in flattened pieces",
                    found="a distributed optimizer that shards its checkpoint by model space",
                    fix="--dist-ckpt-optim-fully-reshardable, or Megatron's own experts",
                )
            return [
                self._shard(prefix, f"{name}.weight{half}", i, part, replica)
                for i, expert in enumerate(stacked.unbind())
                for half, part in zip(halves, expert.chunk(len(halves)), strict=True)
            ]

        def merge(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(parts).view(weight.shape)

        return ShardedTensorFactory(f"{prefix}experts.{name}.weight", weight, build, merge, replica_id)

    def _shard(
        self, prefix: str, name: str, local_expert: int, part: torch.Tensor, replica_id: tuple[int, ...]
    ) -> ShardedTensor:
        expert = self.first + local_expert
        if self.by_name:
            key, offsets = f"{prefix}experts.{expert}.{name}", self.offsets
        else:
            key, offsets = f"{prefix}experts.{name}", (*self.offsets, (len(self.offsets), expert, self.number))
        return ShardedTensor.from_rank_offsets(
            key, part, *offsets, replica_id=replica_id, prepend_axis_num=len(offsets)
        )
