"""Layouts on GPUs: the kernels beside a device copy, and whole MoE layers, each way from a dispatch to a grouped GEMM.

    torchrun --nproc-per-node 4 benchmarks/gpu_layouts.py [--out benchmarks/results/h200x4/layouts.jsonl]
    torchrun --nproc-per-node 2 benchmarks/gpu_layouts.py --dry-run       # tiny sizes, on the CPU: no figures

Kinds of rows:

    kernel   a call's kernels, forward and backward, on what one rank of the group receives: `us` is what they take on
             the device, from a CUDA graph of many calls (`common.graph_times`), and `gb_s` and `of_copy` are of it;
             `eager_us` is a call launched from Python, the mean of ten in a row, where a small one is bound by the
             host. `of_copy` is bytes / time over that of a device copy, in a graph or eagerly, whichever is faster;
             bytes are those of rows read, each time that they are (the cache may have them by then), and written. No
             graphs in a dry run
    layer    one layer forward on ElasticBuffer, after its output was compared with fp64; medians of the slowest rank,
             "alone" from an idle GPU, "in a row" the mean of eight

Variants alternate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Results, graph_times
from gpu_layer_cost import time_variants
from layout_layers import Batch, Model, check, expected_rows, variants
from megatron_ep_v2.layouts.choose import kernels_of

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.fused_a2a import get_buffer
from megatron_ep_v2.layouts import (
    Places,
    gather_payload,
    gather_rows,
    gather_weights,
    place_contiguous,
    place_masked,
    reduce_rows,
    rows_that_fit,
)
from megatron_ep_v2.wire.quantize import to_wire

SHAPES = {"qwen3-30b-a3b": (2048, 128, 8), "deepseek-v3": (7168, 256, 8)}  # hidden, experts, top-k
LAYER = {"hidden": 2048, "ffn": 768, "experts": 128, "topk": 8}  # Qwen3-30B-A3B
DECODE, PREFILL = (1, 16, 64, 128, 512), 4096  # tokens a rank
COPIED = 1 << 29  # bytes
BACKWARD = "backward of reduce, weighted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tokens", type=int, nargs="+", default=[PREFILL, *DECODE], help="a rank, of the layers")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    limit = timedelta(seconds=120)  # of one collective: a rank that fails does not keep the others
    if options.dry_run:
        dist.init_process_group("gloo", timeout=limit)
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()), timeout=limit)
    results = Results(options.out, "gpu_layouts.py")
    with torch.no_grad():
        for shape, sizes in ({"tiny": (256, 8, 3)} if options.dry_run else SHAPES).items():
            tokens = 32 if options.dry_run else PREFILL
            results.add(measure_kernels(shape, *sizes, tokens, device, options.repeats))
        for rows in measure_layers(options, device):
            results.add(rows)
    results.finish()
    megatron_ep_v2.destroy_buffers()
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------------- kernels


def received(tokens: int, experts: int, topk: int, device: str) -> torch.Tensor:
    """[R, K] local ids, as one rank of the group receives them."""
    ranks = dist.get_world_size()
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    picks = torch.rand(tokens * ranks, experts, generator=generator, device=device).topk(topk, dim=1).indices
    picks = picks.masked_fill(picks >= experts // ranks, -1)
    return picks[(picks >= 0).any(dim=1)].contiguous()


def measure_kernels(
    shape: str, hidden: int, experts: int, topk: int, tokens: int, device: str, repeats: int
) -> list[dict[str, Any]]:
    local = experts // dist.get_world_size()
    picks = received(tokens, experts, topk, device)
    num_picks = int((picks >= 0).sum())
    aligned = place_contiguous(picks, None, local, rows_that_fit(num_picks, local))
    masked = place_masked(picks, None, local, -(-int(torch.bincount(picks[picks >= 0]).max()) // 128) * 128)
    x = torch.randn(len(picks), hidden, device=device).bfloat16()
    weights = torch.rand(len(picks), topk, device=device)
    payload = to_wire(x, "fp8")
    assert isinstance(payload, tuple)
    y = gather_rows(x, aligned)
    row, scale = hidden * 2, hidden + payload[1].shape[1] * 4  # bytes of a bf16 row, of an 8-bit one with its scales
    source = torch.empty(COPIED if device == "cuda" else 1 << 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def moved(places: Places) -> int:
        return num_picks + places.num_rows

    cases: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (lambda: target.copy_(source), 2 * source.numel()),
        "gather, contiguous": (lambda: gather_rows(x, aligned), moved(aligned) * row),
        "gather, masked": (lambda: gather_rows(x, masked), moved(masked) * row),
        "gather fp8, mn-major scales": (lambda: gather_payload(payload, aligned, "mn_major"), moved(aligned) * scale),
        "reduce": (lambda: reduce_rows(y, aligned), (num_picks + len(x)) * row),
        "reduce, weighted": (lambda: reduce_rows(y, aligned, weights), (num_picks + len(x)) * row),
        BACKWARD: (backward_of_reduce(y, x, aligned, weights), (2 * num_picks + len(y)) * row),
        "places, contiguous": (lambda: place_contiguous(picks, None, local, aligned.num_rows), 0),
        "places, masked": (lambda: place_masked(picks, None, local, masked.expected_m or 1), 0),
        "gather weights": (lambda: gather_weights(weights, aligned), 0),
    }
    runs = {name: case[0] for name, case in cases.items()}
    eager = medians(runs, device, repeats)
    times = eager
    if device == "cuda":  # of the backward, what autograd calls: its own thread and streams are not captured
        _, mover = kernels_of(y)
        runs[BACKWARD] = lambda: mover.spread(x, y, aligned.rows, aligned.sources, weights)
        times = graph_times(runs, repeats)
        times["copy"] = min(times["copy"], eager["copy"])  # large ones are slower in a graph
    speed = {name: cases[name][1] / times[name] / 1e3 for name in cases}  # bytes / us = MB / s
    sizes = {"kind": "kernel", "shape": shape, "ranks": dist.get_world_size(), "received_rows": len(x)}
    return [
        {**sizes, "picks": num_picks, "kernel": name, "us": round(times[name], 1), "eager_us": round(eager[name], 1)}
        | ({"gb_s": round(speed[name], 1), "of_copy": round(speed[name] / speed["copy"], 3)} if cases[name][1] else {})
        for name in cases
    ]


def backward_of_reduce(
    y: torch.Tensor, grad: torch.Tensor, places: Places, weights: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, ...]]:
    with torch.enable_grad():
        inputs = [y.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = reduce_rows(inputs[0], places, inputs[1])
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def medians(runs: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """Microseconds of a call, the mean of ten in a row; median over repeats, slowest rank."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            if device == "cpu":
                begin = time.perf_counter()
                run()
                took = (time.perf_counter() - begin) * 1e6
            else:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                start.record()
                for _ in range(10):
                    run()
                end.record()
                end.synchronize()
                took = start.elapsed_time(end) * 100
            if repeat >= 2:  # the first ones compile and warm up
                times[name].append(took)
    slowest = torch.tensor([statistics.median(values) for values in times.values()], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(times, slowest.tolist(), strict=True))


# --------------------------------------------------------------------------------------------------------------- layers


def measure_layers(options: argparse.Namespace, device: str) -> Iterator[list[dict[str, Any]]]:
    """Rows of one number of tokens after the other."""
    sizes = {"hidden": 256, "ffn": 64, "experts": 8, "topk": 3} if options.dry_run else LAYER
    capacity = 64 if options.dry_run else max(PREFILL, *options.tokens)
    buffer_kind = "reference" if options.dry_run else "elastic"
    settings.activate(settings.resolve(buffer=buffer_kind, num_max_tokens_per_rank=capacity, watchdog_secs=0))
    model = Model.make(**sizes, device=device)
    for tokens in (capacity, 1, 16) if options.dry_run else options.tokens:
        batch = Batch.make(model, tokens, device)
        # One buffer and one set of kernels for all sizes.
        buffer = get_buffer(dist.group.WORLD, batch.x, batch.picks, model.experts, batch.probs)
        runs = variants(buffer, model, batch)
        errors = check(runs, model, batch)
        if device == "cuda":
            times = time_variants(runs, options.repeats)
            by_kind = {
                name: {f"{kind}_us": round(statistics.median(values), 1) for kind, values in kinds.items()}
                for name, kinds in times.items()
            }
        else:
            by_kind = {name: {"alone_us": round(took, 1)} for name, took in medians(runs, device, 2).items()}
        first = next(iter(by_kind.values()))
        yield [
            {"kind": "layer", "tokens_per_rank": tokens, "ranks": dist.get_world_size(), "variant": name}
            | ({"expected_m": expected_rows(batch, model)} if "masked" in name else {})
            | took
            | {f"{kind.removesuffix('_us')}_ratio": round(took[kind] / first[kind], 3) for kind in took}
            | {"relative_l2": float(f"{errors[name]:.1e}"), "num_sms": buffer.num_sms}
            for name, took in by_kind.items()
        ]


if __name__ == "__main__":
    main()
