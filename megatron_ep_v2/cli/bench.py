"""`python -m megatron_ep_v2 bench`: Megatron's dispatchers side by side on this machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.bench import on_cpu, ranks, report
from megatron_ep_v2.bench.layer import Groups
from megatron_ep_v2.bench.progress import Progress
from megatron_ep_v2.bench.shapes import DTYPES, PRESETS, ROUTINGS, Shape
from megatron_ep_v2.bench.table import Point, measure_table
from megatron_ep_v2.bench.variants import VARIANTS, Variant
from megatron_ep_v2.errors import EPError, SettingsError

_DESCRIPTION = """Time Megatron's MoE dispatchers side by side: dispatch, experts that pass rows through, combine, and
their backward. Every variant's output and gradients are compared with the closed form before it is timed. Under
torchrun it takes the ranks that it finds; else it starts its own."""


def bench(arguments: list[str]) -> int:
    """Measure and print; the exit status, 1 if a variant gave a wrong result.

    Raises:
        SettingsError: The options do not fit together, or this machine.
    """
    options = _parser().parse_args(arguments)
    place = settings.launch()
    if place is None:
        num_ranks = options.ranks or (torch.cuda.device_count() if torch.cuda.is_available() else 2)
        _points(options, num_ranks)  # refused here, once, rather than by every rank
        return ranks.start(num_ranks, arguments)
    if options.ranks and options.ranks != place.ranks:
        raise SettingsError(
            "--ranks is for starting ranks, but they are started already",
            found=f"--ranks {options.ranks} and {place.ranks} ranks",
            fix="leave --ranks out under torchrun",
        )
    points, variants = _points(options, place.ranks), _variants(options)
    warnings.filterwarnings("ignore")
    device = ranks.join(place)
    try:
        with on_cpu.substitutions() if device.type == "cpu" else _compiled_like_training():
            return _measure(points, variants, device, _command(arguments, place), options.out)
    finally:
        megatron_ep_v2.destroy_buffers()
        dist.destroy_process_group()


def _measure(points: list[Point], variants: list[Variant], device: torch.device, command: str, out: Path | None) -> int:
    main = dist.get_rank() == 0
    groups, progress = Groups(), Progress(len(points), silent=not main)
    rows: list[dict[str, Any]] = []
    header = report.environment(command) if main else {}
    for point in points:
        progress.next_table(f"{point.shape.name} {point.routing}")
        torch.compiler.reset()  # else shapes that change from table to table are compiled as unknown
        measured = measure_table(point, variants, device, groups, progress)
        rows += measured
        if main:
            print(report.table(measured), end="\n\n", flush=True)
            if out:
                report.write_rows(out, header, rows)  # after each table: a run that is cut off leaves what it has
    summary = report.summary(rows)
    if main:
        if summary["noisy"]:
            print("This machine was too noisy for these rows; they may differ by more than 10 % in another run:")
            print("".join(f"  {line}\n" for line in summary["noisy"]))
        print(json.dumps({"environment": header, "rows": rows, "summary": summary}))
    return 1 if summary["wrong"] else 0


@contextlib.contextmanager
def _compiled_like_training() -> Iterator[None]:
    """Megatron compiles small functions, here once for each dispatcher. Past torch's limit the last ones in the table
    would be left uncompiled, and compared unfairly."""
    torch._dynamo.config.recompile_limit = 128
    yield


def _points(options: argparse.Namespace, num_ranks: int) -> list[Point]:
    """One for each table."""
    points = []
    dtype = options.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    for name in options.shapes:
        shape = _shape(name, options)
        if shape.experts % num_ranks or shape.topk > shape.experts:
            raise SettingsError(
                f"the shape {name} does not fit {num_ranks} ranks",
                found=f"{shape.experts} experts, top-{shape.topk}",
                needed="experts a multiple of the ranks, and at least top-k of them",
                fix="choose another shape or number of ranks",
            )
        for routing in options.routing:
            points.append(
                Point(
                    shape=shape,
                    tokens=options.tokens,
                    routing=routing,
                    dtype=dtype,
                    repeats=options.repeats,
                    sms=options.sms or (None,),
                    seed=options.seed,
                )
            )
    return points


def _shape(name: str, options: argparse.Namespace) -> Shape:
    if name != "custom":
        return dataclasses.replace(PRESETS[name], topk=options.topk or PRESETS[name].topk)
    if not (options.hidden and options.experts and options.topk):
        raise SettingsError("--shapes custom needs a shape", fix="add --hidden, --experts and --topk")
    return Shape("custom", options.hidden, options.experts, options.topk, options.expert_ffn)


def _variants(options: argparse.Namespace) -> list[Variant]:
    """Those asked for; by default all but the raw calls of the reference where there are GPUs."""
    chosen = [VARIANTS[name] for name in options.variants or VARIANTS]
    if not options.variants and torch.cuda.is_available():
        chosen = [variant for variant in chosen if not (variant.kind == "raw" and variant.buffer == "reference")]
    return [variant for variant in chosen if variant.layout in (None, *options.layout)]


def _command(arguments: list[str], place: settings.Launch) -> str:
    """What to type to get the same again."""
    launcher = "python" if place.store else f"torchrun --nproc-per-node {place.local_ranks}"
    return " ".join([launcher, "-m megatron_ep_v2 bench", *arguments])


def _sm_counts(text: str) -> tuple[int | None, ...]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return tuple(count or None for count in counts)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ep_v2 bench",
        description=_DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", nargs="+", choices=[*PRESETS, "custom"], default=["qwen3-30b-a3b"], help="one table each")
    add("--variants", nargs="+", choices=list(VARIANTS), help="rows; by default all that this environment offers")
    add("--tokens", type=_positive, default=4096, help="tokens per rank")
    add("--routing", nargs="+", choices=ROUTINGS, default=["balanced"], help="one table each")
    add("--dtype", choices=list(DTYPES), help="by default bf16 on GPUs and fp32 on the CPU")
    add("--layout", nargs="+", choices=["compact", "expanded"], default=["compact", "expanded"], help="of our rows")
    add("--sms", type=_sm_counts, help="SM counts a,b,c, a row each; 0 = the library's choice")
    add("--topk", type=_positive, help="instead of the preset's; of a custom shape")
    add("--hidden", type=_positive, help="of a custom shape")
    add("--experts", type=_positive, help="of a custom shape, over all ranks")
    add("--expert-ffn", type=_positive, default=1024, help="width of one expert of a custom shape")
    add("--repeats", type=_positive, default=30, help="rounds in which every variant has a turn")
    add("--seed", type=int, default=0, help="of tokens and routing")
    add("--ranks", type=_positive, help="processes to start; by default one per GPU, or 2 on the CPU")
    add("--out", type=Path, help="write header and rows to this JSONL file")
    return parser


def main(arguments: list[str]) -> None:
    """`bench`, with errors as messages."""
    try:
        status = bench(arguments)
    except EPError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 2
    raise SystemExit(status)
