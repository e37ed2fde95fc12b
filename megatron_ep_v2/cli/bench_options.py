"""The options of `bench`."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch

from megatron_ep_v2.bench.shapes import DTYPES, PRESETS, ROUTINGS
from megatron_ep_v2.bench.variants import EXPERT_BACKENDS, VARIANTS
from megatron_ep_v2.cli import prog

_DESCRIPTION = """\
Time Megatron's MoE dispatchers side by side: dispatch, experts that pass rows through, combine, and their backward.
Every variant's output and gradients are compared with the closed form before it is timed. Under torchrun it takes the
ranks that it finds; else it starts its own. With --step, whole training steps; with --tune, the SM count and layout
with the best step."""
_LAYOUTS = ["compact", "expanded", "sync-free"]
_SMS_TO_TUNE = (None, 8, 16, 24, 32, 48, 64)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options with their defaults filled in; exits on --help and on what cannot be parsed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    whole_step = options.step or options.tune
    on_gpu = torch.cuda.is_available()
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    options.repeats = options.repeats or (10 if whole_step or not on_gpu else 30)
    options.sms = options.sms or (_SMS_TO_TUNE if options.tune else (None,))
    options.tokens = options.tokens or ([4096] if on_gpu else [512])
    if options.redundant_experts:
        options.expert_backends = options.expert_backends or ["grouped"]
    options.expert_backends = options.expert_backends or (["megatron"] if options.tune else ["megatron", "grouped"])
    if whole_step and len(options.tokens) > 1:
        parser.error("--step and --tune take one number of --tokens")
    if options.overload and options.routing != ["balanced"]:
        parser.error("--overload forces the routing: it takes no --routing")
    if options.overload and options.tune:
        parser.error("--tune takes no --overload")
    if options.hot_experts and not (options.overload and options.step):
        parser.error("--hot-experts is for --step with --overload")
    if options.redundant_experts and (options.tune or not options.step):
        parser.error("--redundant-experts needs whole training steps: --step without --tune")
    if options.redundant_experts and len(options.sms) > 1:
        parser.error("--redundant-experts takes one number of --sms")
    if (options.overlap or options.shared_expert_ffn) and not whole_step:
        parser.error("--overlap and --shared-expert-ffn are for whole training steps: --step or --tune")
    if options.overlap and options.redundant_experts:
        parser.error("--overlap takes no --redundant-experts")
    if options.balance_min_rows and not options.redundant_experts:
        parser.error("--balance-min-rows is for --redundant-experts")
    if options.redundant_experts and not on_gpu:
        options.balance_min_rows = options.balance_min_rows or 1  # so that a rehearsal's few rows are planned
    return options


def _parser() -> argparse.ArgumentParser:
    names = textwrap.fill(", ".join(VARIANTS), 116, initial_indent="  ", subsequent_indent="  ")
    parser = argparse.ArgumentParser(
        prog=f"{prog()} bench",
        usage="%(prog)s [options]",
        description=_DESCRIPTION,
        epilog=f"variants:\n{names}\n\nshapes:\n  {', '.join([*PRESETS, 'custom'])}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is dispatched")
    what.add_argument(
        "--shapes",
        nargs="+",
        choices=[*PRESETS, "custom"],
        default=["qwen3-30b-a3b"],
        metavar="SHAPE",
        help="one table each; default qwen3-30b-a3b",
    )
    what.add_argument("--hidden", type=_positive, metavar="N", help="of a custom shape")
    what.add_argument("--experts", type=_positive, metavar="N", help="of a custom shape, over all ranks")
    what.add_argument(
        "--experts-per-rank",
        type=_positive,
        metavar="N",
        help="instead of the shape's own number: as many on a rank as a larger expert-parallel group would leave there",
    )
    what.add_argument("--topk", type=_positive, metavar="N", help="of a custom shape; or instead of the preset's")
    what.add_argument("--expert-ffn", type=_positive, default=1024, metavar="N", help="of a custom shape; default 1024")
    what.add_argument(
        "--tokens",
        nargs="+",
        type=_positive,
        metavar="N",
        help="per rank, one table each; default 4096 on GPUs, 512 on the CPU",
    )
    what.add_argument(
        "--routing", nargs="+", choices=ROUTINGS, default=["balanced"], help="one table each; default balanced"
    )
    what.add_argument(
        "--overload",
        nargs="+",
        type=_overload,
        metavar="X",
        help="force the routing, so that the busiest rank receives X times the mean; one table each",
    )
    what.add_argument("--dtype", choices=list(DTYPES), help="default bf16 on GPUs, fp32 on the CPU")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of tokens and routing")

    how = parser.add_argument_group("with what")
    how.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help="default all that this environment offers"
    )
    how.add_argument(
        "--layout", nargs="+", choices=_LAYOUTS, default=_LAYOUTS, metavar="NAME", help=f"of our variants: {_LAYOUTS}"
    )
    how.add_argument("--sms", type=_sm_counts, metavar="A,B,C", help="SM counts, a row each; 0 = the library's choice")
    how.add_argument("--ranks", type=_positive, metavar="N", help="to start; default one per GPU, or 2 on the CPU")
    how.add_argument(
        "--repeats",
        type=_positive,
        metavar="N",
        help="rounds of all variants; default 30; with --step or on the CPU 10",
    )
    how.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write header and rows")

    step = parser.add_argument_group("whole training steps")
    step.add_argument(
        "--step", action="store_true", help="step time with each dispatcher and kind of experts, in a Qwen3-MoE"
    )
    step.add_argument("--tune", action="store_true", help="the SM count and layout with the best step")
    step.add_argument(
        "--expert-backends",
        nargs="+",
        choices=EXPERT_BACKENDS,
        metavar="NAME",
        help=f"a row each: {', '.join(EXPERT_BACKENDS)}; default megatron and grouped, for --tune megatron",
    )
    step.add_argument(
        "--no-optimizer",
        dest="optimizer",
        action="store_false",
        help="forward, backward and reduction alone, without the memory of masters and moments",
    )
    step.add_argument(
        "--redundant-experts",
        nargs="+",
        type=int,
        choices=range(9),
        metavar="N",
        help="replica slots of each rank, a row for each number, and one without; what they give, over --overload",
    )
    step.add_argument(
        "--hot-experts",
        type=_positive,
        metavar="N",
        help="with --overload: so many of the busiest rank's experts are busy; default all of them alike",
    )
    step.add_argument(
        "--balance-min-rows",
        type=_positive,
        metavar="N",
        help="the fewest rows for which a copy is planned; default the setting's, on the CPU 1",
    )
    step.add_argument(
        "--shared-expert-ffn",
        type=_positive,
        metavar="N",
        help="width of a layer's shared experts, together; default none, with --overlap the preset's",
    )
    step.add_argument(
        "--overlap",
        action="store_true",
        help="a row more for each dispatcher that can run shared experts next to its communication (GPUs)",
    )
    step.add_argument("--layers", type=_positive, metavar="N", help="default the preset's, or as many as fit")
    step.add_argument("--micro-batches", type=_positive, default=1, metavar="N", help="of --tokens each; default 1")
    step.add_argument("--vocab-size", type=_positive, default=256, metavar="N", help="default 256")
    step.add_argument("--traces", type=Path, metavar="FOLDER", help="write a trace of one step of each row (GPUs)")
    step.add_argument("--recompute", action="store_true", help="full activation recomputation (GPUs)")
    return parser


def _sm_counts(text: str) -> tuple[int | None, ...]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return tuple(count or None for count in counts)


def _overload(text: str) -> float:
    value = float(text)
    if not value >= 1:  # nor NaN
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
