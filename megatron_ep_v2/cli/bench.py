"""`python -m megatron_ep_v2 bench`: compare Megatron's dispatchers on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.bench import ranks, report
from megatron_ep_v2.bench.layer import Groups
from megatron_ep_v2.bench.progress import Progress
from megatron_ep_v2.bench.session import session
from megatron_ep_v2.bench.shapes import PRESETS, Shape
from megatron_ep_v2.bench.table import Point, measure_table
from megatron_ep_v2.bench.variants import VARIANTS, Variant
from megatron_ep_v2.buffers.carriers import CARRIERS, REFERENCE
from megatron_ep_v2.cli.bench_options import parse
from megatron_ep_v2.errors import EPError, SettingsError


def main(arguments: list[str]) -> None:
    """Run `bench`, and print an EPError as a message."""
    try:
        status = bench(arguments)
    except EPError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 2
    raise SystemExit(status)


def bench(arguments: list[str]) -> int:
    """Measure and print. Returns the exit status: 1 if a variant gave a wrong result.

    Raises:
        SettingsError: The options do not fit each other or this machine.
    """
    options = parse(arguments)
    job = settings.launch()
    num_ranks = job.ranks if job else options.ranks or (torch.cuda.device_count() or 2)
    if job and options.ranks and options.ranks != job.ranks:
        raise SettingsError(
            "--ranks is for starting ranks, but they are started already",
            found=f"--ranks {options.ranks} and {job.ranks} ranks",
            fix="leave --ranks out under torchrun",
        )
    shapes = [_shape(name, options, num_ranks) for name in options.shapes]
    variants = _variants(options)
    whole_step = _whole_step() if options.step or options.tune else None
    if job is None:
        return ranks.start(num_ranks, arguments)
    command = _command(arguments, job)
    if whole_step:
        return int(whole_step.run(options, shapes, variants, job, command))
    points = [
        Point(
            shape=shape,
            tokens=tokens,
            routing=routing,
            dtype=options.dtype,
            repeats=options.repeats,
            sms=options.sms,
            seed=options.seed,
        )
        for shape in shapes
        for routing in options.routing
        for tokens in options.tokens
    ]
    with session(job) as device:
        return _measure(points, variants, device, command, options.out)


def _measure(
    points: Sequence[Point], variants: Sequence[Variant], device: torch.device, command: str, out: Path | None
) -> int:
    main = dist.get_rank() == 0
    groups, progress = Groups(), Progress(len(points), silent=not main)
    rows: list[dict[str, Any]] = []
    header = report.environment(command) if main else {}
    for point in points:
        progress.next_table(f"{point.shape.name} {point.routing} {point.tokens}")
        torch.compiler.reset()  # else shapes that change between tables are compiled as dynamic
        measured = measure_table(point, variants, device, groups, progress)
        rows += measured
        if main:
            print(report.table(measured), end="\n\n", flush=True)
            if out:
                report.write_rows(out, header, rows)  # after each table, so that an aborted run keeps its rows
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
    if shape.experts % num_ranks or shape.topk > shape.experts:
        raise SettingsError(
            f"the shape {name} does not fit {num_ranks} ranks",
            found=f"{shape.experts} experts, top-{shape.topk}",
            needed="experts a multiple of the ranks, and at least top-k of them",
            fix="choose another shape or number of ranks",
        )
    return shape


def _variants(options: argparse.Namespace) -> list[Variant]:
    """The requested variants; by default all that fit: no raw calls in a training step, only this package's own for
    --tune alone, and on GPUs no reference, which is slow there."""
    on_gpu, whole_step = torch.cuda.is_available(), options.step or options.tune

    def fits(variant: Variant) -> bool:
        if variant.kind == "raw" and (whole_step or (on_gpu and variant.buffer == REFERENCE)):
            return False
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
    else:
        chosen = [variant for variant in VARIANTS.values() if fits(variant)]
    return [variant for variant in chosen if variant.layout in (None, *options.layout)]


def _whole_step() -> Any:
    """Import the part that trains the example's model. It is in the source tree only, next to the example."""
    root = Path(megatron_ep_v2.__file__).resolve().parents[1]
    folders = [root / "benchmarks", root / "examples"]
    if not (folders[0] / "whole_step").is_dir():
        raise SettingsError(
            "bench --step and --tune need the source tree, for the example's model",
            found=f"no benchmarks/whole_step next to the installed package in {root.name}",
            fix="git clone the repository and run the same command in it",
        )
    sys.path[:0] = [str(folder) for folder in folders]
    return importlib.import_module("whole_step")


def _command(arguments: list[str], job: settings.Launch) -> str:
    """The command line that repeats this run."""
    launcher = "python" if job.store else f"torchrun --nproc-per-node {job.local_ranks}"
    return " ".join([launcher, "-m megatron_ep_v2 bench", *arguments])
