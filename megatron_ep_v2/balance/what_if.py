"""What redundant experts would do to recorded expert loads: the planner on counts, without a dispatch.

A recording is a JSONL file, a step a line: {"step": 12, "ranks": 8, "expert_load": [...]}. `expert_load` has for each
micro-batch and each layer the tokens of each logical expert, [micro-batches][layers][experts] whole numbers, summed
over the ranks; rank r is the home of the r-th part of the experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ep_v2.balance.planner import greedy, overload
from megatron_ep_v2.errors import InputError

# Which part of a step takes as long as its busiest rank: experts, dispatch and combine. Two reported pairs of speed and
# overload (UltraEP, docs/balance.md) give 0.36 and 0.68, if all overload was removed.
EXPERT_SHARE = 0.5


@dataclass(frozen=True)
class Prediction:
    """For one layer, or for all of them.

    Attributes:
        num_slots: R, replica slots on each rank; 0 = as recorded.
        mean, largest: Rows of the busiest rank over the mean of the ranks; over the micro-batches.
        replicas: Planned in a micro-batch of a layer, mean.
    """

    num_slots: int
    mean: float
    largest: float
    replicas: float


def to_line(step: int, expert_load: torch.Tensor) -> str:
    """A line of a recording.

    Args:
        expert_load: [micro-batches, layers, ranks, experts of a rank] whole numbers.
    """
    ranks = expert_load.shape[2]
    return json.dumps({"step": step, "ranks": ranks, "expert_load": expert_load.flatten(2).tolist()}) + "\n"


def recorded(path: Path) -> torch.Tensor:
    """Read a recording.

    Returns:
        [micro-batches of all steps, layers, ranks, experts of a rank] int64.

    Raises:
        InputError: There is no such file, or a line is not as the module says, or differs in its sizes from the others.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {path}",
            found=str(getattr(error, "strerror", error)),
            fix="give the expert_load.jsonl that --record-load has written",
        ) from error
    parts = [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not parts or len({part.shape[1:] for part in parts}) > 1:
        raise InputError(
            f"the lines of {path} cannot be read as one recording",
            found=f"layers, ranks and experts of a rank: {sorted({tuple(part.shape[1:]) for part in parts})}",
            needed="one model on one number of ranks, and at least one line",
            fix="a file for each run",
        )
    return torch.cat(parts)


def _parsed(line: str, where: str) -> torch.Tensor:
    try:
        row = json.loads(line)
        load, ranks = torch.tensor(row["expert_load"]), int(row["ranks"])
        if load.dim() != 3 or load.is_floating_point() or ranks < 1 or not load.numel() or int(load.min()) < 0:
            raise ValueError(f"{load.dtype} {tuple(load.shape)} of {ranks} ranks")
        return load.unflatten(2, (ranks, -1))
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"{where} is no line of a recording",
            found=f"{type(error).__name__}: {error}",
            needed='{"step": n, "ranks": P, "expert_load": [micro-batches][layers][experts]}, experts a multiple of P',
            fix="record with --record-load, or write such lines",
        ) from error


def predict(
    expert_load: torch.Tensor, slots: Sequence[int], min_rows: int, from_percent: int
) -> tuple[list[list[Prediction]], list[Prediction]]:
    """Plan every micro-batch of every layer with each number of slots.

    Args:
        expert_load: As `recorded` returns it.
        slots: Numbers of replica slots; 0 = as recorded.
        min_rows, from_percent: As for `planner.plan`.

    Returns:
        By layer, a prediction for each of `slots`; and the same over all layers.
    """
    by_slots = [[_after(loads, n, min_rows, from_percent) for loads in expert_load.unbind(1)] for n in slots]
    layers = [
        [_prediction(n, [found[layer]]) for n, found in zip(slots, by_slots, strict=True)]
        for layer in range(expert_load.shape[1])
    ]
    return layers, [_prediction(n, found) for n, found in zip(slots, by_slots, strict=True)]


def step_gain(before: float, after: float, share: float) -> float:
    """How much more tokens a second, as a fraction, if a step takes 1 + share * (x - 1) at overload x."""
    return (1 + share * (before - 1)) / (1 + share * (after - 1)) - 1


def _after(loads: torch.Tensor, num_slots: int, min_rows: int, from_percent: int) -> tuple[torch.Tensor, float]:
    """[micro-batches] overload of one layer, and replicas a micro-batch.

    Args:
        loads: [micro-batches, ranks, experts of a rank].
    """
    ranks, local = loads.shape[1:]
    rank_rows, replicas = loads.sum(dim=2), 0
    for rows, totals in zip(rank_rows, loads.flatten(1).tolist(), strict=True):
        for move in greedy(totals, ranks, num_slots, min_rows, from_percent):
            rows[move.expert // local] -= move.rows
            rows[move.rank] += move.rows
            replicas += 1
    return overload(rank_rows), replicas / len(loads)


def _prediction(num_slots: int, found: Sequence[tuple[torch.Tensor, float]]) -> Prediction:
    """From `_after` of one or more layers."""
    values = torch.cat([of_layer for of_layer, _ in found])
    replicas = sum(of_layer for _, of_layer in found) / len(found)
    return Prediction(num_slots, values.mean().item(), values.max().item(), replicas)
