"""Soak: many MoE layers through Megatron's flex dispatcher with batch sizes that change every step, ranks with fewer
tokens and with none. Memory and the number of compiled kernels must stay where the warm-up left them.

    torchrun --nproc-per-node 8 benchmarks/gpu_soak.py [--out benchmarks/results/h200x8/soak.jsonl]
    torchrun --nproc-per-node 2 benchmarks/gpu_soak.py --cpu             # a rehearsal on the reference buffer
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2.bench.check import require_equal
from megatron_ep_v2.bench.kernels import count_kernels
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.bench.shapes import PRESETS, TINY, Shape
from megatron_ep_v2.bench.timing import slowest_rank

if TYPE_CHECKING:  # importing it imports Megatron
    from megatron_ep_v2.megatron.standalone import Dispatcher


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--every", type=int, default=50, help="steps between readings")
    parser.add_argument("--layout", choices=("compact", "expanded"), default="expanded")
    parser.add_argument("--most-tokens", type=int, default=4096, help="of a rank")


def measure(run: Run) -> Iterator[list[Row]]:
    from megatron_ep_v2.megatron.standalone import make_dispatchers

    options, shape = run.options, TINY if run.cpu else PRESETS["qwen3-30b-a3b"]
    megatron_ep_v2.install(buffer=run.buffer, layout=options.layout, num_max_tokens_per_rank=options.most_tokens)
    alone = dist.new_group([run.rank], use_local_synchronization=True)
    sizes = {"hidden": shape.hidden, "experts": shape.experts, "topk": shape.topk, "dtype": torch.bfloat16}
    (dispatcher,) = make_dispatchers("flex", "deepep", 1, dist.group.WORLD, alone, **sizes)

    counts = torch.Generator().manual_seed(run.rank)
    start, compiled = time.perf_counter(), set()
    for step in range(1, options.steps + 1):
        # The first step is full on every rank; then one rank in eight is empty and the others are anything.
        empty = step > 1 and int(torch.randint(8, (), generator=counts)) == 0
        tokens = 0 if empty else int(torch.randint(1, options.most_tokens + 1, (), generator=counts))
        _layer(dispatcher, shape, options.most_tokens if step == 1 else tokens, step, run)
        if step % options.every == 0:
            reading = _reading(step, time.perf_counter() - start, run)
            if step >= options.warmup:
                compiled.add(reading["compiled_kernels"])
            yield [reading]
    megatron_ep_v2.uninstall()
    assert len(compiled) <= 1, f"kernels were compiled after the warm-up: {sorted(compiled)}"


def _layer(dispatcher: Dispatcher, shape: Shape, num_tokens: int, step: int, run: Run) -> None:
    """One layer, forward and backward, with every gradient checked: experts pass rows through, weighted, so that the
    rows of a token add up to the token."""
    device, generator = run.device, run.generator(step)
    x = torch.randn(num_tokens, shape.hidden, generator=generator, device=device).bfloat16().requires_grad_()
    scores = torch.rand(num_tokens, shape.experts, generator=generator, device=device)
    top = scores.topk(shape.topk, dim=1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top.indices, True)
    probs = torch.zeros_like(scores).scatter_(1, top.indices, top.values.softmax(dim=1)).requires_grad_()

    rows, sent_probs = dispatcher.dispatch_preprocess(x, chosen, probs)
    rows, row_probs = dispatcher.token_dispatch(rows, sent_probs)
    rows, _, row_probs = dispatcher.dispatch_postprocess(rows, row_probs)
    rows = (rows * row_probs[:, None]).to(rows.dtype)
    y = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))
    y.float().sum().backward()
    require_equal({f"step {step}": y.detach()}, x.detach(), 2e-2, device)
    assert bool(torch.isfinite(x.grad).all()) and bool(torch.isfinite(probs.grad).all())


def _reading(step: int, seconds: float, run: Run) -> Row:
    memory = [0, 0, 0]
    if not run.cpu:
        free, total = torch.cuda.mem_get_info()
        memory = [torch.cuda.memory_reserved(), torch.cuda.memory_allocated(), total - free]
        torch.cuda.reset_peak_memory_stats()
    reserved, allocated, used = (round(value / 2**20, 1) for value in slowest_rank(memory, run.device))
    return {
        "step": step,
        "layout": run.options.layout,
        "seconds": round(seconds, 2),
        "reserved_mib": reserved,
        "allocated_mib": allocated,
        "device_used_mib": used,
        "compiled_kernels": count_kernels(),
    }


if __name__ == "__main__":
    rehearsal = {"steps": 20, "warmup": 5, "every": 5, "most_tokens": 64}
    main(__doc__, measure, add_options, repeats=None, rehearsal=rehearsal)
