"""One table: every variant at one shape. Build, compare with the closed form, and only then take times."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2 import settings as settings_module
from megatron_ep_v2.bench import timing
from megatron_ep_v2.bench.check import errors
from megatron_ep_v2.bench.dispatchers import DispatcherLayer
from megatron_ep_v2.bench.entry import Entry, entries_of, noted, without_repetitions
from megatron_ep_v2.bench.layer import Groups, Layer, within
from megatron_ep_v2.bench.progress import Progress
from megatron_ep_v2.bench.raw import RawLayer
from megatron_ep_v2.bench.rows import Row, add_ratios, measured
from megatron_ep_v2.bench.shapes import DTYPES, Batch, Shape, make_batch, pairs_sent, rank_load, wire_pairs
from megatron_ep_v2.bench.variants import Variant

# Relative L2. bf16 is summed in bf16: 8 x of one token is off by 6e-3 where one dispatcher adds in another order.
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-5}
T = TypeVar("T")
TRANSFERS = 4  # dispatch, combine, and the backward of each


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one table is about."""

    shape: Shape
    tokens: int
    routing: str
    dtype: str
    repeats: int
    overload: float | None = None
    sms: tuple[int | None, ...] = (None,)
    seed: int = 0


def measure_table(
    point: Point, variants: Sequence[Variant], device: torch.device, groups: Groups, progress: Progress
) -> list[Row]:
    """The same on every rank; collective."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    overload = (point.overload, ranks) if point.overload else None
    dtype = DTYPES[point.dtype]
    batch = make_batch(point.shape, point.tokens, point.routing, dtype, rank, device, point.seed, overload)
    sent, load, busiest = _traffic(batch, point.shape, ranks)
    progress.say("link: plain all_to_all_single of large blocks")
    link = timing.measure_link(device)

    entries: list[Entry[Layer]] = entries_of(variants, point.sms)
    for entry in entries:
        with noted(entry):
            if entry.variant.kind == "raw":
                entry.layer = RawLayer(entry.variant, batch, point.shape, entry.sms, groups)
            else:
                entry.layer = DispatcherLayer(entry.variant, batch, point.shape, entry.sms, load, groups)
    for entry in (entry for entry in entries if entry.layer):
        progress.say(f"{entry.label}: first call (a new shape is compiled kernel by kernel, up to a minute)")
        with noted(entry):
            _run_once(entry)
        if entry.layer:
            _judge(entry, TOLERANCE[point.dtype], device)
    times = _take_times([entry for entry in entries if entry.status == "ok"], point.repeats, device, progress)

    pair_bytes = point.shape.hidden * DTYPES[point.dtype].itemsize
    common: Row = {
        "shape": point.shape.name,
        "hidden": point.shape.hidden,
        "experts": point.shape.experts,
        "topk": point.shape.topk,
        "tokens_per_rank": point.tokens,
        "ranks": ranks,
        "routing": point.routing,
        "overload": point.overload,
        "dtype": point.dtype,
        "repeats": point.repeats,
        "layers_in_a_row": timing.IN_A_ROW if device.type == "cuda" else 1,
        "busiest_rank_load": round(load, 3),
        "busiest_expert_load": round(busiest, 3),
        "logical_bytes": point.tokens * point.shape.topk * pair_bytes * TRANSFERS,
        "wire_bytes": wire_pairs(sent) * pair_bytes,
        "link_gb_per_s": float(f"{link:.4g}"),
    }
    rows = []
    for entry in without_repetitions(entries):
        row = common | entry.described()
        if id(entry) in times:
            row |= measured(times[id(entry)], common["wire_bytes"], link)
        rows.append(row)
    for entry in entries:
        if entry.layer:
            entry.layer.close()
        entry.layer = None
    megatron_ep_v2.destroy_buffers()
    settings_module.activate(None)
    add_ratios(rows)
    return rows


def _traffic(batch: Batch, shape: Shape, ranks: int) -> tuple[torch.Tensor, float, float]:
    """[ranks, ranks] (token, rank) pairs sent; load of the busiest rank and of the busiest expert."""
    mine = pairs_sent(batch.topk_idx, shape.experts, ranks)
    sent = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(sent, mine)
    per_expert = batch.routing_map.sum(dim=0)
    dist.all_reduce(per_expert)
    busiest = float(per_expert.max() / per_expert.double().mean())
    return torch.stack(sent).cpu(), rank_load(per_expert.cpu(), ranks), busiest


def _run_once(entry: Entry[Layer]) -> None:
    """Relative L2 of this rank's results against the closed form."""
    assert entry.layer is not None

    def run(layer: Layer) -> dict[str, torch.Tensor]:
        layer.run(backward=True)
        return layer.results()

    found = within(entry.layer, run)
    entry.errors = errors(found, entry.layer.expected())


def _judge(entry: Entry[Layer], tolerance: float, device: torch.device) -> None:
    """The worst errors of all ranks; a wrong variant gets no time."""
    assert entry.errors is not None
    worst = timing.slowest_rank(list(entry.errors.values()), device)
    entry.errors = dict(zip(entry.errors, worst, strict=True))
    wrong = {name: error for name, error in entry.errors.items() if error > tolerance}
    if wrong:
        entry.status = "wrong"
        entry.reason = "WRONG RESULT (relative L2: " + ", ".join(f"{n} {e:.1e}" for n, e in wrong.items()) + ")"


def _take_times(
    entries: list[Entry[Layer]], repeats: int, device: torch.device, progress: Progress
) -> dict[int, dict[str, list[float]]]:
    """By id of the entry: microseconds of each kind and repeat, slowest rank; bytes in "peak_memory", largest over
    ranks."""
    on_gpu = device.type == "cuda"
    in_a_row = timing.IN_A_ROW if on_gpu else 1
    kinds = {"forward": (in_a_row, False), "forward_backward": (in_a_row, True)}
    if on_gpu:
        kinds["alone"] = (1, True)
    layers = {id(entry): entry.layer for entry in entries if entry.layer}

    def each(action: Callable[[Layer], T]) -> dict[int, T]:
        return {key: within(layer, action) for key, layer in layers.items()}

    def warm_up(layer: Layer) -> None:
        for _ in range(4 if on_gpu else 1):
            layer.run(backward=False)
            layer.run(backward=True)

    def take(layer: Layer) -> dict[str, float]:
        taken = {}
        for kind, (count, backward) in kinds.items():
            run = functools.partial(layer.run, backward=backward, count=count)
            taken[kind], host = timing.measure(run, device, count)
            if kind == "alone" or (not on_gpu and backward):
                taken["host"] = host
        return taken

    def take_memory(layer: Layer) -> list[float]:
        layer.results()  # nothing of the last run is left
        peak = timing.peak_memory(lambda: layer.run(backward=True), device)
        layer.results()
        return timing.slowest_rank([math.nan if peak is None else peak], device)

    progress.say("warm-up")
    each(warm_up)
    times = timing.alternate(layers, lambda key: within(layers[key], take), repeats, device, after_round=progress.round)
    for key, peak in each(take_memory).items():
        times[key]["peak_memory"] = peak
    return times
