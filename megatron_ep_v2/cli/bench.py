"""`python -m megatron_ep_v2 bench`: Megatron's dispatchers side by side on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ep_v2 import settings
from megatron_ep_v2.bench import ranks, report
from megatron_ep_v2.bench.layer import Groups
from megatron_ep_v2.bench.progress import Progress
from megatron_ep_v2.bench.rows import Row
from megatron_ep_v2.bench.session import session
from megatron_ep_v2.bench.shapes import PRESETS, Shape, most_overload
from megatron_ep_v2.bench.table import Point, measure_table
from megatron_ep_v2.bench.variants import REDUNDANT_EXPERTS, SYNC_FREE_EXPERTS, VARIANTS, Variant
from megatron_ep_v2.buffers.carriers import CARRIERS, REFERENCE
from megatron_ep_v2.cli.bench_options import parse
from megatron_ep_v2.errors import EPError, SettingsError
from megatron_ep_v2.gpus import gpu_ranks


def main(arguments: list[str]) -> None:
    """`bench`, with errors as messages."""
    try:
        status = bench(arguments)
    except EPError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 2
    raise SystemExit(status)


def bench(arguments: list[str]) -> int:
    """Measure and print; the exit status, 1 if a variant gave a wrong result.

    Raises:
        SettingsError: The options do not fit together, or this machine.
    """
    options = parse(arguments)
    place = settings.launch()
    num_ranks = place.ranks if place else options.ranks or (gpu_ranks() or 2)
    if place and options.ranks and options.ranks != place.ranks:
        raise SettingsError(
            "--ranks is for starting ranks, but they are started already",
            found=f"--ranks {options.ranks} and {place.ranks} ranks",
            fix="leave --ranks out under torchrun",
        )
    shapes = [_shape(name, options, num_ranks) for name in options.shapes]
    variants = _variants(options)
    if place is None:
        return ranks.start(num_ranks, ["-m", "megatron_ep_v2", "bench", *arguments])
    command = ranks.command(place, ["-m", "megatron_ep_v2", "bench", *arguments])
    if options.step or options.tune:
        from megatron_ep_v2.cli import bench_step  # needs Megatron, which the table does not need to be imported

        return bench_step.run(options, shapes, variants, place, command)
    points = [
        Point(
            shape=shape,
            tokens=tokens,
            routing=routing,
            overload=overload,
            dtype=options.dtype,
            repeats=options.repeats,
            sms=options.sms,
            seed=options.seed,
        )
        for shape in shapes
        for routing in options.routing
        for overload in options.overload or [None]
        for tokens in options.tokens
    ]
    with session(place) as device:
        return _measure(points, variants, device, command, options.out)


def _measure(
    points: Sequence[Point], variants: Sequence[Variant], device: torch.device, command: str, out: Path | None
) -> int:
    main = dist.get_rank() == 0
    groups, progress = Groups(), Progress(len(points), silent=not main)
    rows: list[Row] = []
    header = report.environment(command) if main else {}
    for point in points:
        overload = f" overload {point.overload}" if point.overload else ""
        progress.next_table(f"{point.shape.name} {point.routing}{overload} {point.tokens}")
        torch.compiler.reset()  # else shapes that change from table to table are compiled as unknown
        measured = measure_table(point, variants, device, groups, progress)
        rows += measured
        if main:
            print(report.table(measured), end="\n\n", flush=True)
            if out:
                report.write_rows(out, header, rows)  # after each table: a run that is cut off leaves what it has
    summary = report.summary(rows)
    if main:
        print(report.noise_warning(summary), end="")
        print(json.dumps({"environment": header, "rows": rows, "summary": summary}))
    return 1 if summary["wrong"] else 0


def _shape(name: str, options: argparse.Namespace, num_ranks: int) -> Shape:
    experts = options.experts_per_rank * num_ranks if options.experts_per_rank else options.experts
    if name != "custom":
        preset = PRESETS[name]
        chosen = experts if options.experts_per_rank else preset.experts
        shape = dataclasses.replace(preset, topk=options.topk or preset.topk, experts=chosen)
    elif options.hidden and experts and options.topk:
        shape = Shape("custom", options.hidden, experts, options.topk, options.expert_ffn)
    else:
        raise SettingsError("--shapes custom needs a shape", fix="add --hidden, --experts and --topk")
    shape = dataclasses.replace(
        shape, shared_ffn=options.shared_expert_ffn or (shape.shared_ffn if options.overlap else 0)
    )
    if options.overlap and not shape.shared_ffn:
        raise SettingsError(
            f"the shape {name} has no shared experts that could run next to communication",
            fix="add --shared-expert-ffn, or leave --overlap out",
        )
    if shape.experts % num_ranks or shape.topk > shape.experts:
        raise SettingsError(
            f"the shape {name} does not fit {num_ranks} ranks",
            found=f"{shape.experts} experts, top-{shape.topk}",
            needed="experts a multiple of the ranks, and at least top-k of them",
            fix="choose another shape or number of ranks",
        )
    most = most_overload(shape, num_ranks, options.hot_experts)
    if options.overload and max(options.overload) > most:
        raise SettingsError(
            "a rank cannot receive so much",
            found=f"--overload {max(options.overload)}",
            needed=f"at most {most:g} with top-{shape.topk} of {shape.experts} experts on "
            f"{num_ranks} ranks: every token's selections, as far as they fit, on one rank"
            + (f", {options.hot_experts} of its experts" if options.hot_experts else ""),
            fix="a smaller --overload, or more ranks" + (" or --hot-experts" if options.hot_experts else ""),
        )
    return shape


def _variants(options: argparse.Namespace) -> list[Variant]:
    """Those asked for; by default all that fit: no raw calls in a training step, only this package's own for --tune
    alone, and on GPUs not the reference, which is slow there and compared with nothing."""
    on_gpu, whole_step = torch.cuda.is_available(), options.step or options.tune

    def fits(variant: Variant) -> bool:
        if variant.kind == "raw" and (whole_step or (on_gpu and variant.buffer == REFERENCE)):
            return False
        if options.redundant_experts:
            return variant.can_be_redundant and (variant.buffer == REFERENCE) != on_gpu
        if variant.sync_free:
            return options.step and not options.tune and not set(SYNC_FREE_EXPERTS).isdisjoint(options.expert_backends)
        if whole_step and on_gpu and variant.buffer == REFERENCE:
            return False
        return (
            variant.buffer is not None and "sync-free" in CARRIERS[variant.buffer].layouts
            if options.tune and not options.step
            else True
        )

    if options.variants:
        chosen = [VARIANTS[name] for name in options.variants]
        for variant in chosen:
            if whole_step and variant.kind == "raw":
                raise SettingsError(
                    f"{variant.name} is no dispatcher: a training step cannot run on it",
                    fix="leave it out, or measure it without --step and --tune",
                )
            if variant.sync_free and not (options.step and not options.tune):
                raise SettingsError(
                    f"{variant.name} needs the experts of a whole training step",
                    found="--tune" if options.tune else "layers whose experts pass rows through",
                    fix="measure it with --step, without --tune",
                )
            if variant.sync_free and set(SYNC_FREE_EXPERTS).isdisjoint(options.expert_backends):
                raise SettingsError(
                    f"{variant.name} needs experts that do not wait for their counts",
                    found=f"--expert-backends {' '.join(options.expert_backends)}",
                    needed=" or ".join(SYNC_FREE_EXPERTS),
                    fix="add --expert-backends grouped",
                )
    else:
        chosen = [variant for variant in VARIANTS.values() if fits(variant)]
    kept = [variant for variant in chosen if variant.layout in (None, *options.layout)]
    if not any(variant.layout for variant in kept) and any(variant.layout for variant in chosen):
        raise SettingsError(
            "no variant of this package has such a layout here",
            found=f"--layout {' '.join(options.layout)}",
            needed="compact or expanded; sync-free in whole training steps (--step without --tune), with "
            f"{' or '.join(SYNC_FREE_EXPERTS)} experts",
            fix="leave --layout out, or name other --variants",
        )
    if options.overlap:
        if not on_gpu:
            raise SettingsError(
                "shared experts cannot run next to communication here",
                found="no GPU",
                needed="a CUDA stream, on which Megatron runs them",
                fix="leave --overlap out, or measure it on GPUs",
            )
        return [each for variant in kept for each in variant.with_overlap(options.recompute)]
    return _with_replica_slots(kept, options) if options.redundant_experts else kept


def _with_replica_slots(variants: Sequence[Variant], options: argparse.Namespace) -> list[Variant]:
    """Each variant as it is, and after it with each number of replica slots, where it takes them."""
    if not any(variant.can_be_redundant for variant in variants) or not set(REDUNDANT_EXPERTS).intersection(
        options.expert_backends
    ):
        raise SettingsError(
            "nothing here takes replica slots",
            found=f"variants {', '.join(variant.name for variant in variants) or 'none'}; "
            f"experts {', '.join(options.expert_backends)}",
            needed=f"{' or '.join(name for name, variant in VARIANTS.items() if variant.can_be_redundant)}, with "
            f"{' or '.join(REDUNDANT_EXPERTS)} experts",
            fix="leave --variants and --expert-backends out",
        )
    numbers = sorted({0, *options.redundant_experts})
    return [
        variant.with_replica_slots(number, options.balance_min_rows)
        for variant in variants
        for number in (numbers if variant.can_be_redundant else [0])
    ]
