"""Activation recompute: a stack of MoE layers without it, with it, and with the first dispatch's handle replayed.

Each layer is a dispatch, an MLP over the received rows (one weight for all experts: the same work as a grouped GEMM of
Qwen3-30B-A3B's) and a combine, under torch's reentrant checkpoint, which does what Megatron's does. Forward + backward
of all layers; variants alternate; CUDA events, medians over repeats of the slowest rank; peak memory beyond what was
allocated before. `kept` is what checkpoints hold between forward and backward.

    torchrun --nproc-per-node 8 benchmarks/gpu_recompute.py [--out benchmarks/results/h200x8/recompute.jsonl]
    torchrun --nproc-per-node 2 benchmarks/gpu_recompute.py --cpu        # a rehearsal on the reference buffer
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron_ep_v2 import device_checks, settings
from megatron_ep_v2.bench.rows import ratio
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.bench.timing import summarise
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.recompute import Replayed

HIDDEN, FFN, EXPERTS, TOPK = 2048, 768, 128, 8  # Qwen3-30B-A3B
VARIANTS = ("no recompute", "recompute", "recompute, replayed")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--layouts", nargs="+", default=["expanded"], choices=("compact", "expanded"))


def line(row: Row) -> str:
    return (
        f"{row['layout']:<9} {row['variant']:<20} {row['microseconds']:>9.0f} us  {row['ratio']:.3f}"
        f"  peak {row['peak_mib']:>7.1f} MiB  kept {row['kept_mib']:>7.1f} MiB"
    )


def measure(run: Run) -> Iterator[list[Row]]:
    options = run.options
    settings.activate(settings.resolve(buffer=run.buffer, num_max_tokens_per_rank=options.tokens))
    for layout in options.layouts:
        stack = Stack(layout, run)
        cases = {variant: _stack_of(stack, variant) for variant in VARIANTS}
        run.require_equal(cases, "no recompute", 1e-2)
        device_checks.read_all()  # the routing was the same
        memory = {variant: stack.memory(variant) for variant in VARIANTS}
        times = run.time_alone(cases)
        device_checks.read_all()  # and was the same while it was timed
        yield [
            {
                "layout": layout,
                "variant": variant,
                "layers": options.layers,
                "tokens_per_rank": options.tokens,
                "ranks": run.ranks,
                "microseconds": round(summarise(times[variant]).median, 1),
                "ratio": ratio(times[variant], times["recompute"]),
                "repeats": options.repeats,
                "peak_mib": round(memory[variant][0], 1),
                "kept_mib": round(memory[variant][1], 1),
            }
            for variant in VARIANTS
        ]


def _stack_of(stack: Stack, variant: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: stack.run(variant)


class Stack:
    """MoE layers one after the other, each with a routing of its own."""

    def __init__(self, layout: str, run: Run):
        options, device, generator = run.options, run.device, run.generator()

        def make(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.layout, self.device = layout, device
        self.x, self.grad = make(options.tokens, HIDDEN).bfloat16(), make(options.tokens, HIDDEN).bfloat16()
        self.x.requires_grad_()
        tops = [make(options.tokens, EXPERTS).softmax(dim=1).topk(TOPK, dim=1) for _ in range(options.layers)]
        self.topk_idx = [top.indices for top in tops]
        self.probs = [top.values.contiguous().requires_grad_() for top in tops]
        self.up, self.down = (make(HIDDEN, FFN) * 0.02).bfloat16(), (make(FFN, HIDDEN) * 0.02).bfloat16()

    def layer(self, x: torch.Tensor, topk_idx: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        expand = self.layout == "expanded"
        rows, idx, row_probs, _, handle = fused_dispatch(
            x, topk_idx, probs, EXPERTS, dist.group.WORLD, do_expand=expand
        )
        weights = row_probs if idx is None else row_probs.masked_fill(idx < 0, 0.0).sum(dim=1)
        rows = (F.silu(rows @ self.up) @ self.down) * weights[:, None].to(rows.dtype)
        return x + fused_combine(rows, dist.group.WORLD, handle)[0]

    def forward(self, variant: str) -> torch.Tensor:
        y = self.x
        for topk_idx, probs in zip(self.topk_idx, self.probs, strict=True):
            if variant == "no recompute":
                y = self.layer(y, topk_idx, probs)
            else:
                function = Replayed(self.layer) if variant == "recompute, replayed" else self.layer
                y = checkpoint(function, y, topk_idx, probs, use_reentrant=True)
        return y

    def run(self, variant: str) -> tuple[torch.Tensor, ...]:
        for leaf in (self.x, *self.probs):
            leaf.grad = None
        y = self.forward(variant)
        y.backward(self.grad)
        assert self.x.grad is not None and self.probs[0].grad is not None
        return y.detach(), self.x.grad, self.probs[0].grad

    def memory(self, variant: str) -> tuple[float, float]:
        """(peak, kept between forward and backward) in MiB; zeros on the CPU."""
        if self.device.type == "cpu":
            return 0.0, 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = self.forward(variant)
        kept = torch.cuda.memory_allocated() - before
        y.backward(self.grad)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20, kept / 2**20


if __name__ == "__main__":
    main(__doc__, measure, add_options, line=line, repeats=15, rehearsal={"tokens": 64, "layers": 2, "repeats": 3})
