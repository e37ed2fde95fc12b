"""How many tokens each expert got: added up, layer by layer, from the counts that every dispatch delivers anyway.

Each layer's manager owns an `ExpertLoad` and adds the counts of its first dispatches (a recomputed one is the same
tokens again): on the host where they are on the host, and on the device, with no wait, where they are there. Layers are
numbered in the order in which this process built their dispatchers, which is Megatron's order; with pipeline
parallelism they are the layers of this process' stages.
"""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep_v2.buffers.groups import find_registered, is_registered, registered
from megatron_ep_v2.errors import GroupMismatchError
from megatron_ep_v2.megatron.copies import refuse_to_pickle_groups, shallow_copy
from megatron_ep_v2.recompute import runs_again

_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, ExpertLoad] = weakref.WeakValueDictionary()  # by age


class ExpertLoad:
    """Rows that this rank's experts of one layer received since the last reading. Lives as long as somebody holds it.

    Args:
        group: Process group of the experts.
        num_local_experts: Experts of this rank.

    Attributes:
        used: Whether it may have counted something since the last `expert_load()`; equal on all ranks of the group.
    """

    def __init__(self, group: Any, num_local_experts: int):
        self.group = group
        self._dispatched = self._captured = False
        self._host = torch.zeros(num_local_experts, dtype=torch.int64, device="cpu")  # whatever the default device is
        self._device: torch.Tensor | None = None
        self.num_local_experts = num_local_experts
        _layers[next(_numbers)] = self

    __reduce_ex__ = refuse_to_pickle_groups
    __copy__ = shallow_copy

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertLoad:
        """For a copy of the layer, which is another layer: it is counted by itself, from 0, in the same group."""
        memo[id(self)] = copied = ExpertLoad(self.group, len(self._host))
        return copied

    def add(self, counts: torch.Tensor) -> None:
        """Add the counts of a dispatch, unless a checkpoint recomputes. Does not wait. Before a CUDA graph captures it,
        it must have run once without one.

        Args:
            counts: [local experts], whole numbers, without padding.
        """
        if runs_again() or torch._C._current_graph_task_id() != -1:  # in a backward: some other checkpoint recomputes
            return
        self._dispatched = True
        if not counts.is_cuda:
            self._host += counts
            return
        if self._device is None:
            with torch.inference_mode(False):  # one made there could not be written to in training
                self._device = torch.zeros(len(self._host), dtype=torch.int64, device=counts.device)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self._captured = True  # and may be replayed at any time
        self._device += counts

    @property
    def used(self) -> bool:
        return self._dispatched or self._captured

    def counts(self) -> torch.Tensor:
        """[local experts] int64 on the host. Waits for the device where counts are there."""
        return self._host.clone() if self._device is None else self._host + self._device.cpu()

    def take(self) -> torch.Tensor:
        """`counts()`, which begin again at 0. The layer still counts as used: `expert_load()` is collective."""
        counts = self.counts()
        self._host.zero_()
        if self._device is not None:
            self._device.zero_()
        return counts

    def reset(self) -> None:
        """After `expert_load()`, on all ranks of the group."""
        self.take()
        self._dispatched = False


def local_expert_load() -> list[torch.Tensor]:
    """For each MoE layer of this process: [local experts] int64, the tokens since the last reading of its own experts.

    Not collective; begins anew at 0.
    """
    return [layer.take() for _, layer in sorted(_layers.items())]


def expert_load() -> list[torch.Tensor]:
    """For each MoE layer of this process: [experts of the group] int64, the tokens since the last reading. Layers whose
    group was destroyed are left out.

    Collective over the experts' group (one exchange for all layers): all its ranks call it at the same step. Other
    groups, those of data parallel replicas, count their own tokens.

    Raises:
        GroupMismatchError: The ranks have used different numbers of MoE layers.
    """
    loads: dict[ExpertLoad, torch.Tensor] = {}
    # Layers that were not used are left out: a model that was given up lives until Python finds its cycles, on some
    # ranks longer than on others. All ranks of a group have used the same ones, because a dispatch is collective.
    for group in dict.fromkeys(layer.group for layer in _on_open_groups() if layer.used):
        loads |= _gather(group)
    return [
        loads.get(layer, torch.zeros(layer.group.size() * layer.num_local_experts, dtype=torch.int64, device="cpu"))
        for layer in _on_open_groups()
    ]


def _on_open_groups() -> list[ExpertLoad]:
    """Of all layers, oldest first, those whose group was not destroyed."""
    return [layer for _, layer in sorted(_layers.items()) if is_registered(find_registered(layer.group))]


def _gather(group: Any) -> dict[ExpertLoad, torch.Tensor]:
    """For each layer of the group that was used: [experts of the group] int64. Collective."""
    for last in (False, True):
        members = [layer for layer in _on_open_groups() if layer.group is group and layer.used]
        by_rank: list[Any] = [None] * group.size()
        dist.all_gather_object(by_rank, [layer.counts().tolist() for layer in members], group=registered(group))
        numbers = [len(by_layer) for by_layer in by_rank]
        if len(set(numbers)) == 1:
            break
        if last:
            raise GroupMismatchError(
                f"rank {group.rank()}: the ranks count the load of different numbers of MoE layers",
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
    """`expert_load()` as scalars, also written to Megatron's TensorBoard and Weights & Biases on the ranks where
    Megatron's training loop opened them. Collective, as `expert_load()` is; call it where the loop logs.

    Args:
        iteration: The step that the loggers file it under.

    Returns:
        "moe/busiest_expert" and "moe/layer_N/busiest_expert": the busiest expert over the mean, 1 where all are even,
        and over all layers their mean; "moe/idle_experts": experts without a token, added up over the layers. Empty if
        nothing was dispatched since the last reading.
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
