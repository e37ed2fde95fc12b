"""What the watchdog costs: training steps with it and without it, in turn, in one run.

A step is a few MoE layers (dispatch, expert GEMMs, combine), forward and backward, and an optimizer step. There is no
attention, so a real step is longer and the cost a smaller part of it. Two process groups over the same ranks have a
buffer each, one watched and one not. Apart from the steps, what a rank itself spends on the four calls of a layer is
measured alone (with a buffer that does nothing), since a busy machine hides microseconds; and what CPU time the
watcher took.

    torchrun --nproc-per-node 2 benchmarks/watchdog_overhead.py [--out benchmarks/results/watchdog_cpu.jsonl]
    torchrun --nproc-per-node 8 benchmarks/watchdog_overhead.py --out benchmarks/results/h200x8/watchdog.jsonl
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megatron_ep_v2 import settings
from megatron_ep_v2.bench import timing
from megatron_ep_v2.bench.calls import RawCalls
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.watchdog.watched_buffer import WatchedBuffer

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
VARIANTS = {"off": 0, "on": settings.Settings().watchdog_secs}
SIZES = ("tokens", "hidden", "ffn", "experts", "topk", "layers", "repeats")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096 if GPU else 512, help="tokens per rank")
    parser.add_argument("--hidden", type=int, default=2048 if GPU else 256)
    parser.add_argument("--ffn", type=int, default=768 if GPU else 128, help="inner width of an expert")
    parser.add_argument("--experts", type=int, default=128 if GPU else 32)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8 if GPU else 4)
    parser.add_argument("--warmup", type=int, default=10)


def measure(run: Run) -> Iterator[list[Row]]:
    options = run.options
    steps = {}
    for name in VARIANTS:
        torch.manual_seed(run.rank)  # the same steps
        steps[name] = _make_step(name, run)
    run.require_equal(steps, "off", 1e-2)
    for step in steps.values():
        for _ in range(options.warmup):
            step()
    watched = next(buffer for buffer in pool.buffers() if isinstance(buffer, WatchedBuffer))
    start, cpu = time.perf_counter(), _cpu_seconds(watched.watch.client.process.pid)
    times = run.time_alone(steps, warmup=0, swap=True)
    watcher_share = (_cpu_seconds(watched.watch.client.process.pid) - cpu) / (time.perf_counter() - start)
    by_variant = {name: [us / 1e3 for us in values] for name, values in times.items()}
    facts = {"ranks": run.ranks, **{name: getattr(options, name) for name in SIZES}}
    rows = []
    for name, step_ms in by_variant.items():
        of_step = timing.summarise(step_ms)
        row = {"watchdog": name, **facts, "step_ms": round(of_step.median, 3)}
        rows.append(row | {"step_ms_p20": round(of_step.p20, 3), "step_ms_p80": round(of_step.p80, 3)})
    paired = timing.summarise([on / off for on, off in zip(by_variant["on"], by_variant["off"], strict=True)])
    on_ms, off_ms = (timing.summarise(by_variant[name]).median for name in ("on", "off"))
    bookkeeping_us = _bookkeeping_us(watched, run)
    summary = {
        "watchdog": "on / off",
        **facts,
        "ratio_of_medians": round(on_ms / off_ms, 4),
        "paired_ratio": round(paired.median, 4),
        "paired_ratio_p20": round(paired.p20, 4),
        "paired_ratio_p80": round(paired.p80, 4),
        "host_us_per_layer": round(bookkeeping_us, 2),
        "host_share_of_step": round(bookkeeping_us * options.layers / (off_ms * 1e3), 6),
        "watcher_cpu_share_of_a_core": round(watcher_share, 5),
    }
    yield [*rows, summary]


def _make_step(name: str, run: Run) -> Callable[[], torch.Tensor]:
    options, group = run.options, dist.new_group()
    tokens, hidden, ffn = options.tokens, options.hidden, options.ffn
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE)
    top = torch.rand(tokens, options.experts, device=DEVICE).topk(options.topk, dim=1)
    gate_up = torch.randn(hidden, 2 * ffn, device=DEVICE, dtype=DTYPE).mul_(hidden**-0.5).requires_grad_()
    down = torch.randn(ffn, hidden, device=DEVICE, dtype=DTYPE).mul_(ffn**-0.5).requires_grad_()
    probs = top.values.softmax(dim=1).requires_grad_()
    optimizer = torch.optim.SGD([gate_up, down], lr=1e-6)

    def step() -> torch.Tensor:
        y = x
        for _ in range(options.layers):
            normal = torch.nn.functional.rms_norm(y, (hidden,))  # else y grows to infinity over the layers
            rows, _, row_probs, _, handle = fused_dispatch(
                normal, top.indices, probs, options.experts, group, do_expand=True
            )
            gate, up = (rows @ gate_up).chunk(2, dim=1)  # all experts share weights: the same work in one GEMM
            rows = (torch.nn.functional.silu(gate) * up * row_probs[:, None].to(DTYPE)) @ down
            y = y + fused_combine(rows, group, handle)[0]
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        probs.grad = None
        return y.detach()

    mine = {"buffer": run.buffer, "watchdog_secs": VARIANTS[name], "num_max_tokens_per_rank": options.tokens}
    settings.activate(settings.resolve(**mine, reference_strict=False))  # rows on the CPU are fp32
    step()  # builds the buffer, which keeps its settings
    return step


def _bookkeeping_us(watched: WatchedBuffer, run: Run, layers: int = 2000) -> float:
    """Microseconds of the host that four watched calls take longer than four unwatched ones; the calls do nothing."""
    x, selections = torch.zeros(8, 8, device=DEVICE), torch.zeros(8, 1, dtype=torch.int64)
    handle = SimpleNamespace(topk_idx=selections, num_sms=0)
    idle = SimpleNamespace(
        dispatch=lambda x, **arguments: (x, None, x, handle, None),
        combine=lambda x, handle, topk_weights=None, **arguments: (x, None, None),
    )
    calls = {
        name: RawCalls(
            buffer=buffer,
            hidden=x,
            grad_output=x,
            topk_idx=selections,
            topk_weights=x,
            num_experts=8,
            do_expand=True,
        )
        for name, buffer in (("idle", idle), ("watched", WatchedBuffer(idle, watched.watch)))
    }

    def take(name: str) -> dict[str, float]:
        host_us = timing.measure(lambda: [calls[name]() for _ in range(layers)], torch.device("cpu"), layers)[1]
        if GPU:
            torch.cuda.synchronize()
        return {"host": host_us}

    times = timing.alternate(calls, take, 9, run.device)
    return statistics.median(on - off for on, off in zip(times["watched"]["host"], times["idle"]["host"], strict=True))


def _cpu_seconds(process: int) -> float:
    """User and system time (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main(__doc__, measure, add_options, repeats=200, needs_gpu=False)
