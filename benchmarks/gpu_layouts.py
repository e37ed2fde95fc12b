"""Layouts on GPUs: the kernels next to a device copy, and whole MoE layers, each way from a dispatch to a grouped GEMM.

    torchrun --nproc-per-node 4 benchmarks/gpu_layouts.py [--out benchmarks/results/h200x4/layouts.jsonl]
    torchrun --nproc-per-node 2 benchmarks/gpu_layouts.py --dry-run       # tiny sizes, on the CPU: no figures

Kinds of rows:

    kernel   a call's kernels, forward and backward, on what one rank of the group receives: `us` is what they take on
             the device, from a CUDA graph of many calls (`timing.time_in_graphs`), and `gb_s` and `of_copy` are of it;
             `eager_us` is a call launched from Python, the mean of eight in a row, where a small one is bound by the
             host. `of_copy` is bytes / time over that of a device copy, in a graph or eagerly, whichever is faster;
             bytes are those of rows read, each time that they are (the cache may have them by then), and written. No
             graphs in a dry run
    layer    one layer forward on ElasticBuffer, after its output was compared with fp64; medians of the slowest rank,
             "alone" from an idle GPU, "in a row" the mean of eight

Variants alternate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from layout_layers import Batch, Model, check, expected_rows, variants

from megatron_ep_v2 import settings
from megatron_ep_v2.bench.rows import timed
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.bench.shapes import PRESETS, TINY, Shape
from megatron_ep_v2.fused_a2a import get_buffer
from megatron_ep_v2.kernels import move
from megatron_ep_v2.kernels.select import kernels_for
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

SHAPES = ("qwen3-30b-a3b", "deepseek-v3")  # of the kernels
LAYER = "qwen3-30b-a3b"
DECODE, PREFILL = (1, 16, 64, 128, 512), 4096  # tokens a rank
COPIED = 1 << 29  # bytes
BACKWARD = "backward of reduce, weighted"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[PREFILL, *DECODE], help="a rank, of the layers")


def measure(run: Run) -> Iterator[list[Row]]:
    with torch.no_grad():
        for shape in [TINY] if run.cpu else [PRESETS[name] for name in SHAPES]:
            yield measure_kernels(shape, 32 if run.cpu else PREFILL, run)
        yield from measure_layers(run)


# -------------------------------------------------------------------------------------------------------------- kernels


def received(tokens: int, shape: Shape, run: Run) -> torch.Tensor:
    """[R, K] local ids, as one rank of the group receives them."""
    scores = torch.rand(tokens * run.ranks, shape.experts, generator=run.generator(), device=run.device)
    selections = scores.topk(shape.topk, dim=1).indices
    selections = selections.masked_fill(selections >= shape.experts // run.ranks, -1)
    return selections[(selections >= 0).any(dim=1)].contiguous()


def measure_kernels(shape: Shape, tokens: int, run: Run) -> list[Row]:
    hidden, local, device = shape.hidden, shape.experts // run.ranks, run.device
    topk_idx = received(tokens, shape, run)
    num_selections = int((topk_idx >= 0).sum())
    aligned = place_contiguous(topk_idx, None, local, rows_that_fit(num_selections, local))
    masked = place_masked(topk_idx, None, local, -(-int(torch.bincount(topk_idx[topk_idx >= 0]).max()) // 128) * 128)
    x = torch.randn(len(topk_idx), hidden, device=device).bfloat16()
    weights = torch.rand(len(topk_idx), shape.topk, device=device)
    payload = to_wire(x, "fp8")
    assert isinstance(payload, tuple)
    y = gather_rows(x, aligned)
    row, scale = hidden * 2, hidden + payload[1].shape[1] * 4  # bytes of a bf16 row, of an 8-bit one with its scales
    source = torch.empty(1 << 16 if run.cpu else COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def moved(places: Places) -> int:
        return num_selections + places.num_rows

    cases: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: target.copy_(source), 2 * source.numel()),
        "gather, contiguous": (lambda: gather_rows(x, aligned), moved(aligned) * row),
        "gather, masked": (lambda: gather_rows(x, masked), moved(masked) * row),
        "gather fp8, mn-major scales": (lambda: gather_payload(payload, aligned, "mn_major"), moved(aligned) * scale),
        "reduce": (lambda: reduce_rows(y, aligned), (num_selections + len(x)) * row),
        "reduce, weighted": (lambda: reduce_rows(y, aligned, weights), (num_selections + len(x)) * row),
        BACKWARD: (backward_of_reduce(y, x, aligned, weights), (2 * num_selections + len(y)) * row),
        "places, contiguous": (lambda: place_contiguous(topk_idx, None, local, aligned.num_rows), 0),
        "places, masked": (lambda: place_masked(topk_idx, None, local, masked.expected_m or 1), 0),
        "gather weights": (lambda: gather_weights(weights, aligned), 0),
    }
    runs = {name: case[0] for name, case in cases.items()}
    kernels = kernels_for(y, move, "layouts")  # what autograd calls: its own thread and streams are not captured
    times, eager = run.time_kernels(
        runs, in_graph={BACKWARD: lambda: kernels.spread(x, y, aligned.rows, aligned.sources, weights)}
    )
    speed = {name: cases[name][1] / times[name] / 1e3 for name in cases}  # bytes / us = MB / s
    sizes = {"kind": "kernel", "shape": shape.name, "ranks": run.ranks, "received_rows": len(x)}
    return [
        {
            **sizes,
            "picks": num_selections,
            "kernel": name,
            "us": round(times[name], 1),
            "eager_us": round(eager[name], 1),
        }
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


# --------------------------------------------------------------------------------------------------------------- layers


def measure_layers(run: Run) -> Iterator[list[Row]]:
    """Rows of one number of tokens after the other."""
    shape = TINY if run.cpu else PRESETS[LAYER]
    capacity = 64 if run.cpu else max(PREFILL, *run.options.tokens)
    settings.activate(settings.resolve(buffer=run.buffer, num_max_tokens_per_rank=capacity, watchdog_secs=0))
    model = Model.make(shape, run.device)
    for tokens in (capacity, 1, 16) if run.cpu else run.options.tokens:
        batch = Batch.make(model, tokens, run.device)
        # One buffer and one set of kernels for all sizes.
        buffer = get_buffer(dist.group.WORLD, batch.x, batch.topk_idx, shape.experts, batch.probs)
        layers = variants(buffer, model, batch)
        errors = check(layers, model, batch)
        times = run.time(layers)
        first = next(iter(times.values()))
        yield [
            {"kind": "layer", "tokens_per_rank": tokens, "ranks": run.ranks, "variant": name}
            | ({"expected_m": expected_rows(batch, model)} if "masked" in name else {})
            | timed(of_layer, first)
            | {"relative_l2": float(f"{errors[name]:.1e}"), "num_sms": buffer.num_sms}
            for name, of_layer in times.items()
        ]


if __name__ == "__main__":
    main(__doc__, measure, add_options, rehearsal={"repeats": 4})
