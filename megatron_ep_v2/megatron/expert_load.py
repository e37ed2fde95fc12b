"""The expert load: tokens per expert and layer, summed from the counts that every dispatch delivers.

Each layer's manager owns an `ExpertLoad` and adds the counts of its dispatches, except recomputed ones, which have the
same tokens. Counts on the host are added on the host, and counts on the device there, without a wait. Layers are
numbered in the order in which this process built their dispatchers, which is Megatron's order; with pipeline
parallelism they are the layers of this process's stages.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep_v2.buffers.groups import find_registered, is_registered, registered
from megatron_ep_v2.errors import GroupMismatchError
from megatron_ep_v2.megatron.copies import refuse_to_pickle_groups
from megatron_ep_v2.recompute import runs_again

_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, ExpertLoad] = weakref.WeakValueDictionary()  # by age


class ExpertLoad:
    """Counter of rows that this rank's experts of one layer received since the last reading. Weakly registered: the
    layer's manager keeps it alive.

    Args:
        group: Process group of the experts.
        num_local_experts: Experts of this rank.

    Attributes:
        used: Whether it may have counted rows since the last reading; equal on all ranks of the group.
    """

    def __init__(self, group: Any, num_local_experts: int):
        self.group = group
        self._dispatched = self._captured = False
        self._host = torch.zeros(num_local_experts, dtype=torch.int64, device="cpu")  # whatever the default device is
        self._device: torch.Tensor | None = None
        self.num_local_experts = num_local_experts
        _layers[next(_numbers)] = self

    __reduce_ex__ = refuse_to_pickle_groups

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertLoad:
        """A new counter at 0 in the same group, for a copy of the layer."""
        memo[id(self)] = copied = ExpertLoad(self.group, len(self._host))
        return copied

    def add(self, counts: torch.Tensor) -> None:
        """Add the counts of a dispatch, unless a checkpoint recomputes. Does not wait. Must run once outside before a
        CUDA graph captures it.

        Args:
            counts: [local experts], whole numbers, without padding.
        """
        if runs_again():
            return
        self._dispatched = True
        if not counts.is_cuda:
            self._host += counts
            return
        if self._device is None:
            with torch.inference_mode(False):  # else an inference tensor, which training cannot write to
                self._device = torch.zeros(len(self._host), dtype=torch.int64, device=counts.device)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self._captured = True  # may be replayed at any time
        self._device += counts

    @property
    def used(self) -> bool:
        return self._dispatched or self._captured

    def take(self) -> torch.Tensor:
        """Return the counts, [local experts] int64 on the host, and reset them. Waits for the device if some are
        there."""
        self._dispatched = False
        counts = self._host.clone()
        self._host.zero_()
        if self._device is not None:
            counts += self._device.cpu()
            self._device.zero_()
        return counts


def local_expert_load() -> list[torch.Tensor]:
    """Read the tokens of this rank's experts since the last reading, per MoE layer: [local experts] int64. Resets the
    counts. Not collective.
    """
    return [layer.take() for _, layer in sorted(_layers.items())]


def expert_load() -> list[torch.Tensor]:
    """Read the tokens of all experts of the group since the last reading, per MoE layer: [experts] int64. Layers whose
    group was destroyed are left out.

    Collective over the experts' group (one exchange for all layers): all its ranks call it at the same step. Groups of
    other data-parallel replicas count their own tokens.

    Raises:
        GroupMismatchError: The ranks have used different numbers of MoE layers.
    """
    layers = [layer for _, layer in sorted(_layers.items()) if is_registered(find_registered(layer.group))]
    loads = [
        torch.zeros(layer.group.size() * layer.num_local_experts, dtype=torch.int64, device="cpu") for layer in layers
    ]
    # Unused layers are skipped: a discarded model lives until Python collects its cycles, on some ranks longer than on
    # others. All ranks of a group have used the same layers, because a dispatch is collective.
    for group in dict.fromkeys(layer.group for layer in layers if layer.used):
        members = [i for i, layer in enumerate(layers) if layer.group is group and layer.used]
        by_rank: list[Any] = [None] * group.size()
        dist.all_gather_object(by_rank, [layers[i].take().tolist() for i in members], group=registered(group))
        if len({len(counts) for counts in by_rank}) > 1:
            raise GroupMismatchError(
                f"rank {group.rank()}: the ranks count the expert load of different numbers of MoE layers",
                found=f"by rank: {[len(counts) for counts in by_rank]}",
                needed="the same layers on every rank of the group",
                fix="call expert_load() on all ranks while they hold the same model",
            )
        for n, i in enumerate(members):
            loads[i] = torch.tensor([count for counts in by_rank for count in counts[n]], device="cpu")
    return loads


def log_expert_load(iteration: int) -> dict[str, float]:
    """Return `expert_load()` as scalars, and write them to Megatron's TensorBoard and Weights & Biases on the ranks
    where Megatron's training loop opened these. Collective, like `expert_load()`; call it where the loop logs.

    Args:
        iteration: Step number for the loggers.

    Returns:
        "moe/layer_N/busiest_expert": tokens of the busiest expert over the mean, 1 if all are even;
        "moe/busiest_expert": its mean over the layers; "moe/idle_experts": experts without a token, summed over the
        layers. Empty if nothing was dispatched since the last reading.
    """
    loads = [(number, load.double()) for number, load in enumerate(expert_load()) if load.sum()]
    busiest = {number: (load.max() / load.mean()).item() for number, load in loads}
    if not busiest:
        return {}
    scalars = {"moe/busiest_expert": sum(busiest.values()) / len(busiest)}
    scalars["moe/idle_experts"] = float(sum(int((load == 0).sum()) for _, load in loads))
    scalars |= {f"moe/layer_{number}/busiest_expert": value for number, value in busiest.items()}
    megatron = sys.modules.get("megatron.training.global_vars")
    tensorboard = getattr(megatron, "_GLOBAL_TENSORBOARD_WRITER", None)
    wandb = getattr(megatron, "_GLOBAL_WANDB_WRITER", None)
    if tensorboard is not None:
        for name, value in scalars.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb is not None:
        wandb.log(scalars, iteration)
    return scalars
