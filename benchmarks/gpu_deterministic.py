"""What deterministic mode costs: a layer's dispatch and combine, forward and backward, with and without it, in one run.

Experts pass rows through; variants alternate; times are CUDA events, medians over repeats of the slowest rank, and
ratios to the same layout without the mode. The mode sorts the received rows of each first dispatch with PyTorch (and
waits on the host for a mask of it); in the compact layout also those of each cached one.

    torchrun --nproc-per-node 8 benchmarks/gpu_deterministic.py [--out benchmarks/results/h200x8/deterministic.jsonl]
    torchrun --nproc-per-node 2 benchmarks/gpu_deterministic.py --cpu    # a rehearsal on the reference buffer
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_ep_v2 import settings
from megatron_ep_v2.bench.calls import FusedCalls
from megatron_ep_v2.bench.rows import ratio
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.bench.shapes import PRESETS, TINY, make_batch
from megatron_ep_v2.bench.timing import summarise


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank")


def line(row: Row) -> str:
    mode = "deterministic" if row["deterministic"] else "without"
    return f"{row['layout']:<9} {mode:<14} {row['microseconds']:>9.0f} us  {row['ratio']:.3f}"


def measure(run: Run) -> Iterator[list[Row]]:
    shape, tokens = TINY if run.cpu else PRESETS["qwen3-30b-a3b"], run.options.tokens
    batch = make_batch(shape, tokens, "balanced", torch.bfloat16, run.rank, run.device)
    cases = {}
    for deterministic in (False, True):
        group = dist.new_group()  # a buffer of its own
        mode = settings.resolve(buffer=run.buffer, deterministic=deterministic, num_max_tokens_per_rank=tokens)
        for layout in ("compact", "expanded"):
            cases[layout, deterministic] = FusedCalls(
                group=group,
                hidden=batch.hidden,
                grad_output=batch.grad_output,
                topk_idx=batch.topk_idx,
                probs=batch.weights,
                num_experts=shape.experts,
                do_expand=layout == "expanded",
                settings=mode,
            )
    for layout in ("compact", "expanded"):
        run.require_equal({key: case for key, case in cases.items() if key[0] == layout}, (layout, False), 5e-3)
    times = run.time_alone(cases)
    yield [
        {
            "layout": layout,
            "deterministic": deterministic,
            "tokens_per_rank": tokens,
            "ranks": run.ranks,
            "microseconds": round(summarise(values).median, 1),
            "ratio": ratio(values, times[layout, False]),
            "repeats": len(values),
        }
        for (layout, deterministic), values in times.items()
    ]


if __name__ == "__main__":
    main(__doc__, measure, add_options, line=line, rehearsal={"tokens": 64, "repeats": 5})
