"""The expert load: tokens per expert and layer, summed from the counts that every dispatch delivers.

Each layer's manager owns an `ExpertLoad` and adds the counts of its dispatches, except recomputed ones, which have the
same tokens. Counts on the host are added on the host, and counts on the device there, without a wait. Layers are
numbered in the order in which this process built their dispatchers, which is Megatron's order; with pipeline
parallelism they are the layers of this process's stages.
"""

from __future__ import annotations

import gc
import itertools
import sys
import weakref

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.groups import find_registered, is_registered, registered
from megatron_ep_v2.errors import GroupMismatchError
from megatron_ep_v2.megatron.copies import refuse_to_pickle_groups, shallow_copy
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
        used: Whether it may have counted rows since the last `expert_load()`; equal on all ranks of the group.
    """

    def __init__(self, group: ProcessGroup, num_local_experts: int):
        self.group = group
        self._dispatched = self._captured = False
        self._host = torch.zeros(num_local_experts, dtype=torch.int64, device="cpu")  # whatever the default device is
        self._device: torch.Tensor | None = None
        self.num_local_experts = num_local_experts
        _layers[next(_numbers)] = self

    __reduce_ex__ = refuse_to_pickle_groups
    __copy__ = shallow_copy

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertLoad:
        """A new counter at 0 in the same group, for a copy of the layer."""
        memo[id(self)] = copied = ExpertLoad(self.group, len(self._host))
        return copied

    def add(self, counts: torch.Tensor) -> None:
        """Add the counts of a dispatch, unless a checkpoint recomputes. Does not wait. Must run once outside before a
        CUDA graph captures it.

        Args:
            counts: [local experts], whole numbers, without padding.
        """
        load = self.load_on(counts.device)
        if load is not None:
            load += counts

    def load_on(self, device: torch.device) -> torch.Tensor | None:
        """For one dispatch: the [local experts] int64 to which its counts on this device are to be added; None if a
        checkpoint recomputes. As `add` otherwise."""
        if runs_again() or torch._C._current_graph_task_id() != -1:  # in a backward: some other checkpoint recomputes
            return None
        self._dispatched = True
        if device.type == "cpu":
            return self._host
        if self._device is None:
            with torch.inference_mode(False):  # else an inference tensor, which training cannot write to
                self._device = torch.zeros(self.num_local_experts, dtype=torch.int64, device=device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured = True  # may be replayed at any time
        return self._device

    @property
    def used(self) -> bool:
        return self._dispatched or self._captured

    def counts(self) -> torch.Tensor:
        """[local experts] int64 on the host. Waits for the device where counts are there."""
        return self._host.clone() if self._device is None else self._host + self._device.cpu()

    def take(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the counts and reset them. The layer still counts as used: `expert_load()` is collective.

        Args:
            device: Where to return them. None = the host, as `counts()`. Counts that are on this device are not waited
                for, and can be taken in a CUDA graph if there are none on the host.
        """
        if device is None:
            counts = self.counts()
        elif self._device is None:
            counts = self._host.to(device, copy=True)
        else:
            counts = self._device.clone()
            if self._host.any():
                counts += self._host.to(device)
        self.clear()
        return counts

    def clear(self) -> None:
        """Set the counts to 0, without a wait. The layer still counts as used."""
        self._host.zero_()
        if self._device is not None:
            self._device.zero_()

    def reset(self) -> None:
        """After `expert_load()`, on all ranks of the group."""
        self.clear()
        self._dispatched = False


def counters() -> dict[str, torch.Tensor]:
    """The counters of this process as they are kept, for code that sets them back."""
    kept: dict[str, torch.Tensor] = {}
    for number, layer in sorted(_layers.items()):
        kept[f"{number} on the host"] = layer._host
        if layer._device is not None:
            kept[f"{number} on the device"] = layer._device
    return kept


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
    loads: dict[ExpertLoad, torch.Tensor] = {}
    # Unused layers are skipped: a discarded model lives until Python collects its cycles, on some ranks longer than on
    # others. All ranks of a group have used the same layers, because a dispatch is collective.
    for group in dict.fromkeys(layer.group for layer in _on_open_groups() if layer.used):
        loads |= _gather(group)
    return [
        loads.get(layer, torch.zeros(layer.group.size() * layer.num_local_experts, dtype=torch.int64, device="cpu"))
        for layer in _on_open_groups()
    ]


def _on_open_groups() -> list[ExpertLoad]:
    """All layers whose group was not destroyed, oldest first."""
    return [
        layer
        for _, layer in sorted(_layers.items())
        if (group := find_registered(layer.group)) is not None and is_registered(group)
    ]


def _gather(group: ProcessGroup) -> dict[ExpertLoad, torch.Tensor]:
    """For each used layer of the group: [experts of the group] int64. Collective."""
    for last in (False, True):
        members = [layer for layer in _on_open_groups() if layer.group is group and layer.used]
        by_rank: list[list[list[int]]] = [[]] * group.size()  # rank, layer, local expert
        dist.all_gather_object(by_rank, [layer.counts().tolist() for layer in members], group=registered(group))
        numbers = [len(by_layer) for by_layer in by_rank]
        if len(set(numbers)) == 1:
            break
        if last:
            raise GroupMismatchError(
                f"rank {group.rank()}: the ranks count the expert load of different numbers of MoE layers",
                found=f"by rank: {numbers}",
                needed="the same layers on every rank of the group",
                fix="call expert_load() on all ranks while they hold the same model",
            )
        members.clear()
        gc.collect()  # of a model that was given up, used and never read, which some rank has not collected yet
    for layer in members:
        layer.reset()
    return {
        layer: torch.tensor([count for by_layer in by_rank for count in by_layer[n]], device="cpu")
        for n, layer in enumerate(members)
    }


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
