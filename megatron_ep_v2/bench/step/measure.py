"""Steps of one model with one dispatcher and one kind of experts after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_ep_v2 import sync_free
from megatron_ep_v2.bench import timing
from megatron_ep_v2.bench.dispatchers import DispatcherSet
from megatron_ep_v2.bench.entry import Entry, noted, without_repetitions
from megatron_ep_v2.bench.exposed import Activity, Exposure, activity, most_exposed
from megatron_ep_v2.bench.layer import Groups, within
from megatron_ep_v2.bench.progress import Progress
from megatron_ep_v2.bench.rows import Row
from megatron_ep_v2.bench.shapes import DTYPES, Shape
from megatron_ep_v2.bench.step.model import FORMULA, step_flops
from megatron_ep_v2.bench.step.replicas import cost_of_calls
from megatron_ep_v2.bench.step.sections import Stopwatch, Watched
from megatron_ep_v2.megatron.qwen3_moe.expert_kinds import ExpertSet
from megatron_ep_v2.megatron.qwen3_moe.options import TrainerOptions
from megatron_ep_v2.megatron.qwen3_moe.step_graph import StepGraph
from megatron_ep_v2.megatron.qwen3_moe.trainer import StepStats, Trainer
from megatron_ep_v2.megatron.standalone import begin_again
from megatron_ep_v2.settings import shown_environment

T = TypeVar("T")
# Loss and gradient norm against alltoall's (or the first variant's), relative. In bf16 a token's last digits decide, in
# deeper layers, which expert it goes to; `bench` without --step is the strict comparison.
TOLERANCE = {"bf16": {"loss": 2e-3, "gradient norm": 5e-2}, "fp32": {"loss": 1e-5, "gradient norm": 1e-4}}
_LOAD = 4.0  # room for the busiest rank in buffers of a fixed size, as a multiple of the mean
_WATCHED_STEPS = 3
_STEPS_TO_CAPTURE = 3  # that a StepGraph takes at most until it replays: its own first, one with new room, the capture


@dataclass(frozen=True)
class Times:
    """Of one entry.

    Attributes:
        step: Microseconds for each repeat, of the slowest rank.
        peak_memory: Bytes, largest over ranks: what a step needs beyond the model; of a graph, what it keeps. NaN where
            it cannot be read.
        dispatch, combine: Percent of the step, mean over ranks; NaN in a graph.
        capture: Seconds on the host; NaN without a graph.
        activity: Of this rank's GPU in one step; None on a CPU.
        exposure: Of the same step, over the ranks.
        replicas: Fields of `cost_of_calls`; None without replica slots.
    """

    step: list[float]
    peak_memory: float
    dispatch: float
    combine: float
    capture: float
    activity: Activity | None
    exposure: Exposure | None
    replicas: Row | None


class Stepper:
    """A variant's dispatchers and a kind of experts in the model's MoE layers, and the step that is taken with them."""

    def __init__(
        self,
        dispatchers: DispatcherSet,
        experts: ExpertSet,
        trainer: Trainer,
        batches: Sequence[torch.Tensor],
        graph: bool = False,
    ):
        self.dispatchers, self.experts, self.trainer, self.batches = dispatchers, experts, trainer, batches
        self.graph = StepGraph(trainer.accumulate, trainer.device) if graph else None

    @property
    def num_sms(self) -> int | None:
        return self.dispatchers.num_sms

    @property
    def buffer_bytes(self) -> int | None:
        return self.dispatchers.buffer_bytes

    def enter(self, watch: Stopwatch | None = None) -> None:
        self.dispatchers.enter()
        self.experts.enter()
        self.trainer.graph = self.graph
        overlap = self.dispatchers.variant.overlap
        for layer, dispatcher in zip(self.trainer.moe_layers, self.dispatchers.dispatchers, strict=True):
            layer.shared_expert_overlap = overlap
            if overlap:
                begin_again(layer.shared_experts)
            layer.token_dispatcher = Watched(dispatcher, watch) if watch else dispatcher

    def leave(self) -> None:
        self.trainer.graph = None
        self.experts.leave()
        self.dispatchers.leave()

    def step(self) -> StepStats:
        return self.trainer.step(self.batches)

    def settled_step(self) -> StepStats:
        """A step like those that follow: where there is a graph, one that is replayed."""
        steps = _STEPS_TO_CAPTURE if self.graph else 1
        return [self.step() for _ in range(steps)][-1]


def measure_steps(
    entries: list[Entry[Stepper]],
    shape: Shape,
    trainer: Trainer,
    repeats: int,
    groups: Groups,
    progress: Progress,
    traces: Path | None = None,
) -> list[Row]:
    """The same on every rank; collective.

    Args:
        trainer: Fresh; with the experts of `owner`.
        traces: Folder for rank 0's trace of a step of each row.
    """
    ranks, options, device = dist.get_world_size(), trainer.options, trainer.device
    batches = _tokens(options, ranks)
    _build(entries, shape, trainer, batches, groups)
    taken: dict[str, StepStats] = {}
    for entry in entries:
        if entry.layer is not None:
            progress.say(f"{entry.label}: first step (a new shape is compiled kernel by kernel, up to a minute)")
            with noted(entry):
                taken[entry.label] = within(entry.layer, Stepper.settled_step)
    stepped = [entry for entry in entries if entry.layer]
    stock = (entry for entry in stepped if entry.variant.name == "alltoall" and entry.experts == "megatron")
    base = next(stock, stepped[0] if stepped else None)
    first = taken[base.label] if base else None
    for entry in stepped:
        assert first is not None
        _judge(entry, taken[entry.label], first, TOLERANCE[options.dtype])

    good = [entry for entry in entries if entry.status == "ok"]
    sync_free.fit()  # of the variants without a host wait; the routing stays the same
    times = _take_times(good, repeats, device, progress, traces)
    tokens = options.shape.seq_length * len(batches)
    flops = step_flops(options.shape, options.shared_expert_ffn, tokens)
    rows = []
    for entry in without_repetitions(entries):
        row = _common(shape.name, trainer, ranks, repeats, len(batches), first) | entry.described()
        stats = taken.get(entry.label)
        variant = entry.variant
        row |= {"redundant_experts": variant.redundant_experts, "overlap": variant.overlap, "waits": variant.waits}
        row["received_overload"] = round(stats.overload.mean().item(), 3) if stats else None
        if id(entry) in times:
            row |= _measured(times[id(entry)], tokens * ranks, flops)
            assert entry.layer is not None
            row["replica_slots_mib"] = round(entry.layer.dispatchers.slot_bytes / 2**20, 2)
        rows.append(row)
    alltoall = [
        row["step_ms"]
        for row in rows
        if "step_ms" in row and row["variant"].startswith("alltoall") and row["expert_backend"] == "megatron"
    ]
    for row in rows:
        if "step_ms" in row:
            row["ratio_to_alltoall"] = round(row["step_ms"] / min(alltoall), 3) if alltoall else None
    for dispatchers in {entry.layer.dispatchers for entry in entries if entry.layer}:
        dispatchers.close()
    return rows


def _build(
    entries: Sequence[Entry[Stepper]], shape: Shape, trainer: Trainer, batches: Sequence[torch.Tensor], groups: Groups
) -> None:
    """Give each entry its layer: experts once for each kind, dispatchers once for each variant and SM count."""
    owners = [layer.experts for layer in trainer.moe_layers]
    experts: dict[str | None, ExpertSet] = {}
    for kind in dict.fromkeys(entry.experts for entry in entries):
        assert kind is not None  # in a training step each entry names its experts
        with noted(*(entry for entry in entries if entry.experts == kind)):
            experts[kind] = ExpertSet(kind, trainer, owners)
    usable = [entry for entry in entries if entry.status == "ok"]
    for variant, sms in dict.fromkeys((entry.variant.name, entry.sms) for entry in usable):
        alike = [entry for entry in usable if (entry.variant.name, entry.sms) == (variant, sms)]
        with noted(*alike):
            dispatchers = DispatcherSet(
                alike[0].variant,
                shape,
                DTYPES[trainer.options.dtype],
                sms,
                _LOAD,
                groups,
                tokens=batches[0][:, 1:].numel(),
                layers=len(owners),
            )
            dispatchers.run_shared_experts(trainer.moe_layers)
            for entry in alike:
                entry.layer = Stepper(dispatchers, experts[entry.experts], trainer, batches, alike[0].variant.graph)


def _judge(entry: Entry[Stepper], stats: StepStats, first: StepStats, tolerance: dict[str, float]) -> None:
    """Equal on every rank, as the statistics are."""
    pairs = {"loss": (stats.loss, first.loss), "gradient norm": (stats.grad_norm, first.grad_norm)}
    entry.errors = {name: abs(mine - theirs) / abs(theirs) for name, (mine, theirs) in pairs.items()}
    wrong = {name: error for name, error in entry.errors.items() if not error <= tolerance[name]}
    if wrong:
        entry.status = "wrong"
        entry.reason = "WRONG RESULT (relative: " + ", ".join(f"{n} {e:.1e}" for n, e in wrong.items()) + ")"


def _take_times(
    entries: list[Entry[Stepper]], repeats: int, device: torch.device, progress: Progress, traces: Path | None
) -> dict[int, Times]:
    steppers = {id(entry): entry.layer for entry in entries if entry.layer}

    def each(action: Callable[[Stepper], T]) -> dict[int, T]:
        return {key: within(stepper, action) for key, stepper in steppers.items()}

    def take(stepper: Stepper) -> dict[str, float]:
        return {"step": timing.measure(stepper.step, device)[0]}

    def take_memory(stepper: Stepper) -> float:
        if stepper.graph is not None:
            return stepper.graph.captures[-1].pool_bytes
        peak = timing.peak_memory(stepper.step, device)
        return math.nan if peak is None else peak

    def take_shares(stepper: Stepper) -> list[float]:
        if stepper.graph is not None:
            return [math.nan, math.nan]  # a graph keeps no stamps
        watch = Stopwatch(device)
        stepper.leave()
        stepper.enter(watch)
        spent = [timing.measure(stepper.step, device)[0] for _ in range(_WATCHED_STEPS)]
        within_ms = watch.milliseconds()
        shares = torch.tensor([100 * 1e3 * within_ms[name] / sum(spent) for name in ("dispatch", "combine")])
        shares = shares.to(device)
        dist.all_reduce(shares)
        return (shares / dist.get_world_size()).tolist()

    progress.say("warm-up")
    each(Stepper.settled_step)
    times = timing.alternate(
        steppers, lambda key: within(steppers[key], take), repeats, device, after_round=progress.round
    )
    peaks, shares = each(take_memory), each(take_shares)
    replicas: dict[int, Row] = {}
    for entry in entries:
        if entry.layer and entry.variant.redundant_experts:
            replicas[id(entry)] = within(
                entry.layer, lambda s: cost_of_calls(s.dispatchers, s.trainer, s.step, repeats, device)
            )
    activities: dict[int, Activity] = {}
    exposures: dict[int, Exposure] = {}
    if device.type == "cuda":
        for entry in entries:
            if entry.layer:
                file = traces / f"{entry.label.replace(', ', '_').replace(' ', '_')}.json.gz" if traces else None
                found = within(entry.layer, lambda stepper: activity(stepper.step, file))  # noqa: B023
                activities[id(entry)], exposures[id(entry)] = found, most_exposed(found, device)
    return {
        key: Times(
            step=by_kind["step"],
            peak_memory=timing.slowest_rank([peaks[key]], device)[0],
            dispatch=shares[key][0],
            combine=shares[key][1],
            capture=next((s.graph.captures[-1].seconds for s in (steppers[key],) if s.graph), math.nan),
            activity=activities.get(key),
            exposure=exposures.get(key),
            replicas=replicas.get(key),
        )
        for key, by_kind in times.items()
    }


def _measured(times: Times, tokens: int, flops_per_rank: int) -> Row:
    step = timing.summarise(times.step)
    peak, found = times.peak_memory, times.activity
    exposure = times.exposure if times.exposure and times.exposure.communication else None  # without deep_ep
    return {
        "step_ms": round(step.median / 1e3, 3),
        "step_p20_ms": round(step.p20 / 1e3, 3),
        "step_p80_ms": round(step.p80 / 1e3, 3),
        "tokens_per_second": round(tokens / step.median * 1e6, 1),
        "tflops_per_rank": float(f"{flops_per_rank / step.median / 1e6:.4g}"),
        "dispatch_percent": None if math.isnan(times.dispatch) else round(times.dispatch, 1),
        "combine_percent": None if math.isnan(times.combine) else round(times.combine, 1),
        "gpu_busy_ms": found and round(found.computing / 1e3, 3),
        "gpu_busy_percent": found and round(100 * found.computing / step.median, 1),
        "traced_step_ms": found and round(found.span / 1e3, 3),
        "gpu_idle_percent": found and round(100 * found.idle / found.span, 1),
        "communication_ms": exposure and round(exposure.communication / 1e3, 3),
        "exposed_ms": exposure and round(exposure.exposed / 1e3, 3),
        "exposed_percent": exposure and round(100 * exposure.share, 1),
        "launches": found and found.launches,
        "longest_kernels_ms": found and {name: round(time / 1e3, 3) for name, time in found.longest.items()},
        "capture_ms": None if math.isnan(times.capture) else round(times.capture * 1e3, 1),
        "peak_memory_mib": None if math.isnan(peak) else round(peak / 2**20, 1),
        "noise": step.noise,
        **(times.replicas or {}),
    }


def _common(name: str, trainer: Trainer, ranks: int, repeats: int, micro_batches: int, first: StepStats | None) -> Row:
    options, shape = trainer.options, trainer.options.shape
    return {
        "shape": name,
        "layers": shape.num_layers,
        "hidden": shape.hidden_size,
        "experts": shape.num_experts,
        "topk": shape.topk,
        "expert_ffn": shape.moe_ffn_hidden_size,
        "shared_expert_ffn": options.shared_expert_ffn,
        "max_connections": shown_environment().get("CUDA_DEVICE_MAX_CONNECTIONS", "unset"),
        "vocabulary": shape.vocab_size,
        "tokens_per_rank": shape.seq_length,
        "micro_batches": micro_batches,
        "ranks": ranks,
        "routing": "the router's own",
        "busiest_expert_load": round(first.expert_balance, 3) if first else None,
        "busiest_rank_load": round(first.overload.mean().item(), 3) if first else None,
        "recompute": options.recompute,
        "optimizer": trainer.optimizer is not None,
        "dtype": options.dtype,
        "repeats": repeats,
        "flops": FORMULA,
    }


def _tokens(options: TrainerOptions, ranks: int) -> list[torch.Tensor]:
    """This rank's micro-batches [1, seq_length + 1], random ids."""
    generator = torch.Generator().manual_seed(1000 * options.seed + dist.get_rank())
    count = options.num_micro_batches(ranks)
    size = (count, 1, options.shape.seq_length + 1)
    return list(torch.randint(options.shape.vocab_size, size, generator=generator))
