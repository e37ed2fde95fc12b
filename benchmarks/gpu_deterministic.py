"""What deterministic mode costs: a layer's dispatch and combine, forward and backward, with and without it, in one run.

Experts pass rows through; variants alternate; times are CUDA events, medians over repeats of the slowest rank, and
ratios to the same layout without the mode. The mode sorts the received rows of each first dispatch with PyTorch (and
waits on the host for a mask of it); in the compact layout also those of each cached one.

    torchrun --nproc-per-node 8 benchmarks/gpu_deterministic.py [--out benchmarks/results/h200x8/deterministic.jsonl]

On the CPU, to try the script: torchrun --nproc-per-node 2 benchmarks/gpu_deterministic.py --cpu
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import environment, start, time_layers, torchrun, write_rows

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch

HIDDEN, EXPERTS, TOPK = 2048, 128, 8  # Qwen3-30B-A3B


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cpu", action="store_true", help="the reference buffer, with few tokens")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = start(options.cpu)
    if options.cpu:
        options.tokens, options.repeats = 64, 5

    variants = {}
    for deterministic in (False, True):
        group = dist.new_group()  # a buffer of its own
        for layout in ("compact", "expanded"):
            variants[layout, deterministic] = _layer(group, layout, deterministic, options, device)
    _agree({key: run() for key, run in variants.items()})
    times = time_layers(variants, options.repeats, device)
    rows = []
    for (layout, deterministic), values in times.items():
        base = statistics.median(times[layout, False])
        rows.append(
            {
                "layout": layout,
                "deterministic": deterministic,
                "tokens_per_rank": options.tokens,
                "ranks": dist.get_world_size(),
                "microseconds": round(statistics.median(values), 1),
                "ratio": round(statistics.median(values) / base, 3),
                "repeats": len(values),
            }
        )
    if dist.get_rank() == 0:
        for row in rows:
            mode = "deterministic" if row["deterministic"] else "without"
            print(f"{row['layout']:<9} {mode:<14} {row['microseconds']:>9.0f} us  {row['ratio']:.3f}")
        write_rows(options.out, environment(torchrun("gpu_deterministic.py")), rows)
    megatron_ep_v2.destroy_buffers()
    dist.destroy_process_group()


def _layer(
    group: Any, layout: str, deterministic: bool, options: argparse.Namespace, device: torch.device
) -> Callable[[], tuple[torch.Tensor, ...]]:
    generator = torch.Generator(device).manual_seed(dist.get_rank())

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x, grad = make(options.tokens, HIDDEN).bfloat16(), make(options.tokens, HIDDEN).bfloat16()
    top = make(options.tokens, EXPERTS).topk(TOPK, dim=1)
    picks, probs = top.indices, top.values.contiguous().requires_grad_()
    x.requires_grad_()
    kind = "reference" if options.cpu else "elastic"
    mine = settings.resolve(buffer=kind, deterministic=deterministic, num_max_tokens_per_rank=options.tokens)

    def run() -> tuple[torch.Tensor, ...]:
        settings.activate(mine)
        x.grad = probs.grad = None
        rows, _, row_probs, _, handle = fused_dispatch(x, picks, probs, EXPERTS, group, do_expand=layout == "expanded")
        y, _ = fused_combine(rows, group, handle)
        torch.autograd.backward([y, row_probs], [grad, row_probs.detach()])
        assert x.grad is not None and probs.grad is not None
        return y.detach(), x.grad, probs.grad

    return run


def _agree(results: dict[Any, tuple[torch.Tensor, ...]]) -> None:
    """Before anything is timed: each layout with and without the mode."""
    for layout in ("compact", "expanded"):
        for with_it, without in zip(results[layout, True], results[layout, False], strict=True):
            error = (with_it.double() - without.double()).norm() / without.double().norm()
            assert error < 5e-3, f"{layout}: deterministic mode changes a result by {error:.1e}"


if __name__ == "__main__":
    main()
