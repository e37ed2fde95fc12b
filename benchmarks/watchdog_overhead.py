"""What the watchdog costs: training steps with it and without it, in turn, in one run.

A step is a few MoE layers (dispatch, expert GEMMs, combine), forward and backward, and an optimizer step. There is no
attention, so a real step is longer and the cost a smaller part of it. Two process groups over the same ranks have a
buffer each, one watched and one not. Beside the steps, what a rank itself spends on the four calls of a layer is
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
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from common import environment, write_rows

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.watchdog.watched_buffer import WatchedBuffer

GPU = torch.cuda.is_available()
DEVICE, DTYPE, BUFFER = ("cuda", torch.bfloat16, "elastic") if GPU else ("cpu", torch.float32, "reference")
VARIANTS = {"off": 0, "on": settings.Settings().watchdog_secs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096 if GPU else 512, help="tokens per rank")
    parser.add_argument("--hidden", type=int, default=2048 if GPU else 256)
    parser.add_argument("--ffn", type=int, default=768 if GPU else 128, help="inner width of an expert")
    parser.add_argument("--experts", type=int, default=128 if GPU else 32)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8 if GPU else 4)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write rows, below an environment header, to this JSONL file")
    options = parser.parse_args()
    if GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if GPU else "gloo")
    torch.manual_seed(dist.get_rank())

    steps = {name: _make_step(name, options) for name in VARIANTS}
    for step in steps.values():
        for _ in range(options.warmup):
            step()
    watched = next(buffer for buffer in pool.buffers() if isinstance(buffer, WatchedBuffer))
    start, cpu = time.perf_counter(), _cpu_seconds(watched.watch.client.process.pid)
    times = _time(steps, options.repeats)
    share = (_cpu_seconds(watched.watch.client.process.pid) - cpu) / (time.perf_counter() - start)
    rows = _rows(times, _bookkeeping_us(watched), share, options)
    if dist.get_rank() == 0:
        for row in rows:
            print(row)
        script = f"torchrun --nproc-per-node {dist.get_world_size()} benchmarks/watchdog_overhead.py"
        write_rows(options.out, environment(script), rows)
    megatron_ep_v2.destroy_buffers()
    dist.destroy_process_group()


def _make_step(name: str, options: argparse.Namespace) -> Callable[[], None]:
    group = dist.new_group()
    tokens, hidden, ffn = options.tokens, options.hidden, options.ffn
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE)
    top = torch.rand(tokens, options.experts, device=DEVICE).topk(options.topk, dim=1)
    gate_up = torch.randn(hidden, 2 * ffn, device=DEVICE, dtype=DTYPE).mul_(hidden**-0.5).requires_grad_()
    down = torch.randn(ffn, hidden, device=DEVICE, dtype=DTYPE).mul_(ffn**-0.5).requires_grad_()
    probs = top.values.softmax(dim=1).requires_grad_()
    optimizer = torch.optim.SGD([gate_up, down], lr=1e-6)

    def step() -> None:
        y = x
        for _ in range(options.layers):
            rows, _, row_probs, _, handle = fused_dispatch(
                y, top.indices, probs, options.experts, group, do_expand=True
            )
            gate, up = (rows @ gate_up).chunk(2, dim=1)  # all experts share weights: the same work in one GEMM
            rows = (torch.nn.functional.silu(gate) * up * row_probs[:, None].to(DTYPE)) @ down
            y = y + fused_combine(rows, group, handle)[0]
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        probs.grad = None

    mine = {"buffer": BUFFER, "watchdog_secs": VARIANTS[name], "num_max_tokens_per_rank": options.tokens}
    settings.activate(settings.resolve(**mine, reference_strict=False))  # rows on the CPU are fp32
    step()  # builds the buffer, which keeps its settings
    return step


def _time(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each step, of the slowest rank. The variants take turns at going first."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats):
        for name in list(steps)[:: 1 if repeat % 2 else -1]:
            _synchronize()
            start = time.perf_counter()
            steps[name]()
            if GPU:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    for name, values in times.items():
        slowest = torch.tensor(values, device=DEVICE)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times[name] = slowest.tolist()
    return times


def _synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()
    dist.barrier()


def _bookkeeping_us(watched: WatchedBuffer, repeats: int = 2000) -> float:
    """Microseconds of the host that four watched calls take longer than four unwatched ones; the calls do nothing."""
    x, picks = torch.zeros(8, 8, device=DEVICE), torch.zeros(8, 1, dtype=torch.int64)
    idle = SimpleNamespace(
        dispatch=lambda x, **arguments: (x, None, None, SimpleNamespace(topk_idx=picks), None),
        combine=lambda x, handle, topk_weights=None, **arguments: (x, None, None),
    )
    costs = []
    for _ in range(9):
        seconds = []
        for buffer in (idle, WatchedBuffer(idle, watched.watch)):
            start = time.perf_counter()
            for _ in range(repeats):
                handle = buffer.dispatch(x, topk_idx=picks)[3]
                buffer.combine(x, handle)
                buffer.dispatch(x, handle=handle)
                buffer.combine(x, handle, x)
            seconds.append(time.perf_counter() - start)
            if GPU:
                torch.cuda.synchronize()
        costs.append((seconds[1] - seconds[0]) / repeats * 1e6)
    return statistics.median(costs)


def _cpu_seconds(process: int) -> float:
    """User and system time (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rows(
    times: dict[str, list[float]], bookkeeping_us: float, watcher_share: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    shape = {
        "ranks": dist.get_world_size(),
        **{name: value for name, value in vars(options).items() if name not in ("warmup", "out")},
    }
    rows = []
    for name, values in times.items():
        fifths = statistics.quantiles(values, n=5)
        rows.append(
            {
                "watchdog": name,
                **shape,
                "step_ms": round(statistics.median(values), 3),
                "step_ms_p20": round(fifths[0], 3),
                "step_ms_p80": round(fifths[3], 3),
            }
        )
    ratios = [on / off for on, off in zip(times["on"], times["off"], strict=True)]
    fifths = statistics.quantiles(ratios, n=5)
    off_ms = statistics.median(times["off"])
    summary = {
        "watchdog": "on / off",
        **shape,
        "ratio_of_medians": round(statistics.median(times["on"]) / off_ms, 4),
        "paired_ratio": round(statistics.median(ratios), 4),
        "paired_ratio_p20": round(fifths[0], 4),
        "paired_ratio_p80": round(fifths[3], 4),
        "host_us_per_layer": round(bookkeeping_us, 2),
        "host_share_of_step": round(bookkeeping_us * options.layers / (off_ms * 1e3), 6),
        "watcher_cpu_share_of_a_core": round(watcher_share, 5),
    }
    return [*rows, summary]


if __name__ == "__main__":
    main()
