"""The expert load, tokens per expert and layer, from the counts that every dispatch delivers; and ranks' overload.

Each layer's manager owns an `ExpertLoad` and adds the counts of its dispatches, except recomputed ones, which have the
same tokens. Counts on the host are added on the host, and counts on the device there, without a wait. Layers are
numbered in the order in which this process built their dispatchers, which is Megatron's order; with pipeline
parallelism they are the layers of this process's stages.

The counts of the last dispatches are kept apart, since a rank that is busy in one micro-batch and idle in the next does
not show in sums. That costs no kernel: a dispatch is added to a row of its own instead of to the sum.
"""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2.balance.planner import overload as overload_of
from megatron_ep_v2.buffers.groups import find_registered, is_registered, registered
from megatron_ep_v2.errors import GroupMismatchError
from megatron_ep_v2.megatron.copies import refuse_to_pickle_groups, shallow_copy
from megatron_ep_v2.recompute import runs_again

# Dispatches since the last reading that are kept apart; of more, the last ones, half of so many or more. It is more
# than steps accumulate, and 64 KiB a layer with 32 local experts.
DISPATCHES = 256
_HALF = DISPATCHES // 2

_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, ExpertLoad] = weakref.WeakValueDictionary()  # by age


@dataclass(frozen=True)
class Overload:
    """Of one layer: rows that the busiest rank of the group received in a dispatch, over the mean of its ranks. 1 is
    even, the number of ranks the worst.

    Attributes:
        mean, largest: Over the dispatches that are kept apart; 1 without any.
        dispatches: How many these are, those in which no rank received a row apart.
    """

    mean: float
    largest: float
    dispatches: int


class ExpertLoad:
    """Counter of rows that this rank's experts of one layer received since the last reading. Weakly registered: the
    layer's manager keeps it alive.

    Args:
        group: Process group of the experts.
        num_local_experts: Experts of this rank.
        moves: Rows may go to replicas on other ranks: a dispatch's counts then have one number more, the rows that this
            rank receives less the tokens of its experts.

    Attributes:
        used: Whether it may have counted rows since the last `expert_load()`; equal on all ranks of the group.
    """

    def __init__(self, group: ProcessGroup, num_local_experts: int, moves: bool = False):
        self.group, self._moves = group, moves
        self._dispatched = self._captured = False
        self.num_local_experts = num_local_experts
        # Row n: dispatch n since the last reading, and those so many times DISPATCHES later. Last row: earlier ones.
        self._host = self._zeros(torch.device("cpu"))  # whatever the default device is
        self._device: torch.Tensor | None = None
        self._number = 0  # of dispatches since the last reading
        _layers[next(_numbers)] = self

    __reduce_ex__ = refuse_to_pickle_groups
    __copy__ = shallow_copy

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertLoad:
        """A new counter at 0 in the same group, for a copy of the layer."""
        memo[id(self)] = copied = ExpertLoad(self.group, self.num_local_experts, self._moves)
        return copied

    def add(self, counts: torch.Tensor) -> None:
        """Add the counts of a dispatch, unless a checkpoint recomputes. Does not wait. Must run once outside before a
        CUDA graph captures it.

        Args:
            counts: [local experts] (one more with `moves`), whole numbers, without padding.
        """
        load = self.load_on(counts.device)
        if load is not None:
            load += counts

    def load_on(self, device: torch.device) -> torch.Tensor | None:
        """For one dispatch: the [local experts] (one more with `moves`) int64 to which its counts on this device are to
        be added; None if a checkpoint recomputes. As `add` otherwise."""
        if runs_again() or torch._C._current_graph_task_id() != -1:  # in a backward: some other checkpoint recomputes
            return None
        self._dispatched = True
        row = self._number % DISPATCHES
        if self._number >= DISPATCHES and row % _HALF == 0:
            self._add_up(row)
        self._number += 1
        if device.type == "cpu":
            return self._host[row]
        if self._device is None:
            with torch.inference_mode(False):  # else an inference tensor, which training cannot write to
                self._device = self._zeros(device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured = True  # may be replayed at any time: the rows of its dispatches then add up
        return self._device[row]

    @property
    def used(self) -> bool:
        return self._dispatched or self._captured

    def counts(self) -> torch.Tensor:
        """[local experts] int64 on the host. Waits for the device where counts are there."""
        return self._kept().sum(dim=0)[: self.num_local_experts]

    def rows_by_dispatch(self) -> torch.Tensor:
        """[DISPATCHES] int64 on the host: rows that this rank received in each dispatch that is kept apart, 0 where
        there is none; the order is the same on all ranks. Waits as `counts`."""
        return self._kept()[:-1].sum(dim=1)

    def take(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the counts and reset them. The layer still counts as used: `expert_load()` is collective.

        Args:
            device: Where to return them. None = the host, as `counts()`. Counts that are on this device are not waited
                for, and can be taken in a CUDA graph if there are none on the host.
        """
        counts = self._kept(device).sum(dim=0)[: self.num_local_experts]
        self.clear()
        return counts

    def moved_by_dispatch(self, number: int, device: torch.device) -> torch.Tensor:
        """[number] int64: for each dispatch since the last reading, at most DISPATCHES, the rows that this rank
        received less the tokens of its experts; 0 without replicas. As `take`, but resets nothing."""
        return self._kept(device)[:number, self.num_local_experts :].sum(dim=1)

    def take_by_dispatch(self, number: int, device: torch.device) -> torch.Tensor:
        """Return the counts of each dispatch since the last reading, and reset them, as `take`.

        Args:
            number: How many dispatches there were; at most DISPATCHES.

        Returns:
            [number, local experts] int64.
        """
        assert number <= DISPATCHES
        counts = self._kept(device)[:number, : self.num_local_experts].clone()
        self.clear()
        return counts

    def clear(self) -> None:
        """Set the counts to 0, without a wait. The layer still counts as used."""
        self._host.zero_()
        if self._device is not None:
            self._device.zero_()
        self._number = 0

    def _kept(self, device: torch.device | None = None) -> torch.Tensor:
        """[DISPATCHES + 1, local experts (one more with `moves`)] on a device, None = the host; waits if there are
        counts on another one."""
        device = device or self._host.device
        if self._device is None:
            return self._host.to(device)
        kept = self._device.to(device)
        return kept + self._host.to(device) if self._host.any() else kept

    def _zeros(self, device: torch.device) -> torch.Tensor:
        columns = self.num_local_experts + self._moves
        return torch.zeros(DISPATCHES + 1, columns, dtype=torch.int64, device=device)

    def _add_up(self, first: int) -> None:
        """Empty the half of the rows that begins with `first`, into the last row."""
        for kept in (self._host, self._device):
            if kept is not None:
                half = kept[first : first + _HALF]
                kept[-1].add_(half.sum(dim=0))
                half.zero_()

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


def dispatches() -> dict[ExpertLoad, int]:
    """How many dispatches each layer's counter has counted since the last reading."""
    return {layer: layer._number for layer in list(_layers.values())}


def set_dispatches(numbers: dict[ExpertLoad, int]) -> None:
    """Set them back, so that the next dispatch goes to the row that it would have had then. `counters()` has the
    rows."""
    for layer in list(_layers.values()):
        layer._number = numbers.get(layer, 0)


def local_expert_load() -> list[torch.Tensor]:
    """Read the tokens of this rank's experts since the last reading, per MoE layer: [local experts] int64. Resets the
    counts. Not collective.
    """
    return [layer.take() for _, layer in sorted(_layers.items())]


@dataclass(frozen=True)
class Reading:
    """Of one layer, since the last reading.

    Attributes:
        tokens: [experts of the group] int64.
        overload: Of the group's ranks.
    """

    tokens: torch.Tensor
    overload: Overload


def expert_load() -> list[torch.Tensor]:
    """Read the tokens of all experts of the group since the last reading, per MoE layer: [experts] int64. Layers whose
    group was destroyed are left out.

    Collective over the experts' group (one exchange for all layers): all its ranks call it at the same step. Groups of
    other data-parallel replicas count their own tokens. A reading ends the counts: `expert_load()`, `overload()` and
    `log_expert_load()` are readings, and `read()` gives what all of them say.

    Raises:
        GroupMismatchError: The ranks have used different numbers of MoE layers.
    """
    return [reading.tokens for reading in read()]


def overload() -> list[Overload]:
    """Read how much more than the mean the busiest rank received since the last reading, per MoE layer: over single
    dispatches, which are micro-batches, and not over their sum. Collective, and raises, as `expert_load()`.

    Of more than `DISPATCHES` dispatches the last ones are reported, half of that number or more. A dispatch that a CUDA
    graph replays counts as one, with the rows of all its replays.
    """
    return [reading.overload for reading in read()]


def read() -> list[Reading]:
    """`expert_load()` and `overload()` in one reading."""
    readings: dict[ExpertLoad, Reading] = {}
    # Unused layers are skipped: a discarded model lives until Python collects its cycles, on some ranks longer than on
    # others. All ranks of a group have used the same layers, because a dispatch is collective.
    for group in dict.fromkeys(layer.group for layer in _on_open_groups() if layer.used):
        readings |= _gather(group)
    return [readings.get(layer) or _unused(layer) for layer in _on_open_groups()]


def _unused(layer: ExpertLoad) -> Reading:
    experts = layer.group.size() * layer.num_local_experts
    return Reading(torch.zeros(experts, dtype=torch.int64, device="cpu"), Overload(1.0, 1.0, 0))


def _on_open_groups() -> list[ExpertLoad]:
    """All layers whose group was not destroyed, oldest first."""
    return [
        layer
        for _, layer in sorted(_layers.items())
        if (group := find_registered(layer.group)) is not None and is_registered(group)
    ]


def _gather(group: ProcessGroup) -> dict[ExpertLoad, Reading]:
    """For each used layer of the group. Collective."""
    for last in (False, True):
        members = [layer for layer in _on_open_groups() if layer.group is group and layer.used]
        # rank, layer, (tokens of local experts, rows by dispatch)
        by_rank: list[list[tuple[list[int], list[int]]]] = [[]] * group.size()
        mine = [(layer.counts().tolist(), layer.rows_by_dispatch().tolist()) for layer in members]
        dist.all_gather_object(by_rank, mine, group=registered(group))
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
    found = {}
    for n, layer in enumerate(members):
        tokens = torch.tensor([count for by_layer in by_rank for count in by_layer[n][0]], device="cpu")
        rows = torch.tensor([by_layer[n][1] for by_layer in by_rank], device="cpu").T
        found[layer] = Reading(tokens, _overload(rows[rows.sum(dim=1) > 0]))
    return found


def _overload(rows: torch.Tensor) -> Overload:
    """rows: [dispatches, ranks]."""
    if not len(rows):
        return Overload(1.0, 1.0, 0)
    values = overload_of(rows)
    return Overload(values.mean().item(), values.max().item(), len(values))


def log_expert_load(iteration: int) -> dict[str, float]:
    """Return a reading as scalars, and write them to Megatron's TensorBoard and Weights & Biases on the ranks where
    Megatron's training loop opened these. Collective, like `expert_load()`; call it where the loop logs.

    Args:
        iteration: Step number for the loggers.

    Returns:
        "moe/layer_N/busiest_expert": tokens of the busiest expert over the mean, 1 if all are even;
        "moe/layer_N/overload_mean" and "..._max": rows of the busiest rank over the mean, over single dispatches, as
        `overload()` has them. "moe/busiest_expert" and "moe/overload_mean": their means over the layers;
        "moe/overload_max": the largest of all layers; "moe/idle_experts": experts without a token, summed over the
        layers. Empty if nothing was dispatched since the last reading.
    """
    readings = {number: reading for number, reading in enumerate(read()) if reading.tokens.sum()}
    if not readings:
        return {}
    loads = {number: reading.tokens.double() for number, reading in readings.items()}
    busiest = {number: (load.max() / load.mean()).item() for number, load in loads.items()}
    overloads = {number: reading.overload for number, reading in readings.items()}
    scalars = {
        "moe/busiest_expert": sum(busiest.values()) / len(busiest),
        "moe/idle_experts": float(sum(int((load == 0).sum()) for load in loads.values())),
        "moe/overload_mean": sum(each.mean for each in overloads.values()) / len(overloads),
        "moe/overload_max": max(each.largest for each in overloads.values()),
    }
    for number in readings:
        scalars[f"moe/layer_{number}/busiest_expert"] = busiest[number]
        scalars[f"moe/layer_{number}/overload_mean"] = overloads[number].mean
        scalars[f"moe/layer_{number}/overload_max"] = overloads[number].largest
    megatron = sys.modules.get("megatron.training.global_vars")
    tensorboard = getattr(megatron, "_GLOBAL_TENSORBOARD_WRITER", None)
    wandb = getattr(megatron, "_GLOBAL_WANDB_WRITER", None)
    if tensorboard is not None:
        for name, value in scalars.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb is not None:
        wandb.log(scalars, iteration)
    return scalars
