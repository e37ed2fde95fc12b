"""`tokens_per_expert`, the one tensor that Megatron takes from a dispatch to its experts, and what it carries for ours.

Megatron's own experts take the same tensor and see counts only. What these experts need besides is in an attribute of
it, which the result of an operation on the tensor does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch

from megatron_ep_v2.buffers.contract import RedundantBuffer
from megatron_ep_v2.errors import SettingsError


@dataclass
class Replicas:
    """Replicas of one dispatch, as its manager planned them.

    Attributes:
        buffer: Of the dispatch.
        mapping: [P, R] int32 on the CPU, see `contract.RedundantBuffer`.
        ran: Whether experts have run them.
    """

    buffer: RedundantBuffer
    mapping: torch.Tensor
    ran: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class RowInfo:
    """What a dispatch knows of its rows besides their counts.

    Attributes:
        alignment: Each count is a multiple of it. Set by `SyncFreeManager`, where the host does not know the counts;
            read by `Groups.from_counts`.
        ends: [L] int32, the running sum of counts on the device. Set and read with `alignment`.
        rows_node: See `Groups`. Set by `ExpandedManager` after a dispatch that was started for the sake of what can run
            next to its backward; read by `Groups.from_counts`.
        replicas: The counts are [L + R], R replica slots. Set by `RedundantManager` if the dispatch has a replica on
            any rank; read by `Experts.forward`.
    """

    alignment: int = 1
    ends: torch.Tensor | None = None
    rows_node: int | None = None
    replicas: Replicas | None = None


_NOTHING = RowInfo()


def row_info(tokens_per_expert: torch.Tensor) -> RowInfo:
    """Read what counts carry; those from elsewhere carry nothing."""
    info: RowInfo = getattr(tokens_per_expert, "row_info", _NOTHING)
    return info


def attach(tokens_per_expert: torch.Tensor, info: RowInfo) -> None:
    """Let counts carry this, instead of what they carried."""
    tokens_per_expert.row_info = info  # type: ignore[attr-defined]


class CountsOnDevice(torch.Tensor):
    """Counts that must stay on the device. Results computed from them are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> NoReturn:
        """Raise: Megatron's own experts call this and would wait for the device."""
        raise SettingsError(
            "these experts want tokens_per_expert on the host, where sync-free mode does not bring it",
            found="a call of tokens_per_expert.tolist(), as in TEGroupedMLP and SequentialMLP",
            needed="experts that take the counts on the device",
            fix="set MCORE_DEEPEP_V2_EXPERTS=grouped before the model is built, or leave MCORE_DEEPEP_V2_SYNC_FREE off",
        )
