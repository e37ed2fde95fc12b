"""What the host wait costs: one MoE layer of SwiGLU experts (torch's grouped GEMM), forward + backward, in the expanded
layout, sync-free, and sync-free in a CUDA graph; then decode, eagerly and in a graph for each bucket.

Cases alternate; times are medians over repeats of the slowest rank. "alone" starts on an idle GPU, as after a wait
somewhere else; "in a row" is the mean of several layers without a pause. Outputs and gradients are compared before
anything is timed.

    torchrun --nproc-per-node 8 benchmarks/gpu_sync_free.py [--out benchmarks/results/h200x8/sync_free.jsonl]
    torchrun --nproc-per-node 2 benchmarks/gpu_sync_free.py --cpu    # a rehearsal on the reference buffer, no graphs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.bench.expert_layer import ExpertLayer, Sizes
from megatron_ep_v2.bench.rows import timed
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.device_checks import read_all
from megatron_ep_v2.layouts import gather_rows, gather_weights, place_contiguous, reduce_rows, rows_that_fit
from megatron_ep_v2.serving import Decode, DecodeGraphs, PrepareFinalize

TOLERANCE = 1.5e-2  # relative L2 in bf16
Given: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, selections, weights


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank")
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 8, 64, 512])


def measure(run: Run) -> Iterator[list[Row]]:
    tokens = run.options.tokens
    sizes = Sizes(tokens, 256, 32, 8, 3) if run.cpu else Sizes(tokens)
    most = max(tokens, *run.options.buckets)
    settings.activate(settings.resolve(buffer=run.buffer, num_max_tokens_per_rank=most))
    yield measure_layer(sizes, run)
    yield from measure_decode(sizes, run)


def measure_layer(sizes: Sizes, run: Run) -> list[Row]:
    layer = ExpertLayer(sizes, dist.group.WORLD, run.device)
    cases: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "expanded": lambda: layer.step(layer.expanded),
        "sync-free": lambda: layer.step(layer.sync_free),
    }
    if not run.cpu:
        run.say("capturing the layer")
        graph, results = layer.capture()
        cases["sync-free, graph"] = lambda: graph.replay() or results
    # A graph leaves its results in the same tensors.
    copies = {name: lambda case=case: {k: v.clone() for k, v in case().items()} for name, case in cases.items()}
    run.require_equal(copies, "expanded", TOLERANCE)
    read_all()  # nothing was left out
    run.say("timing the layer")
    times = run.time(cases)
    facts = {"what": "layer, forward + backward", "tokens_per_rank": sizes.tokens, "ranks": run.ranks}
    return [facts | {"variant": name} | timed(times[name], times["expanded"]) for name in cases]


def measure_decode(sizes: Sizes, run: Run) -> Iterator[list[Row]]:
    """Rows of one bucket after the other."""
    group, most = dist.group.WORLD, max(run.options.buckets)
    megatron_ep_v2.destroy_buffers()
    settings.activate(settings.resolve(buffer=run.buffer, num_max_tokens_per_rank=most))
    pair = PrepareFinalize(
        group,
        hidden=sizes.hidden,
        num_experts=sizes.experts,
        num_topk=sizes.topk,
        max_prefill_tokens=most,
        max_decode_tokens=most,
    )
    local = sizes.experts // group.size()

    def experts(work: Decode) -> torch.Tensor:
        """Rows to their experts' slots and back; each expert passes them through."""
        places = place_contiguous(
            work.topk_idx, work.num_recv, local, rows_that_fit(work.topk_idx.numel(), local, 1), 1
        )
        rows = gather_rows(work.rows, places) * gather_weights(work.topk_weights, places)[:, None]
        return reduce_rows(rows.bfloat16(), places)

    graphs = DecodeGraphs(pair, experts, run.device)
    for bucket in run.options.buckets:
        run.say(f"decode, bucket {bucket}")
        generator = run.generator(bucket)
        x = torch.randn(bucket, sizes.hidden, generator=generator, device=run.device).bfloat16()
        scores = torch.rand(bucket, sizes.experts, generator=generator, device=run.device)
        weights, selections = scores.topk(sizes.topk, dim=1)
        given = x, selections, weights

        def eager(given: Given = given, bucket: int = bucket) -> torch.Tensor:
            return pair.finalize(experts(pair.prepare_decode(*given, bucket=bucket)))

        def replay(given: Given = given, bucket: int = bucket) -> torch.Tensor:
            return graphs(*given, bucket=bucket)

        cases = {"eager": eager, "graph": replay}
        copies = {name: lambda case=case: case().clone() for name, case in cases.items()}
        run.require_equal(copies, x.double() * weights.sum(dim=1, keepdim=True).double(), TOLERANCE)
        times = run.time(cases)
        facts = {"what": "decode: prepare, places, finalize", "bucket": bucket, "ranks": run.ranks}
        yield [facts | {"variant": name} | timed(times[name], times["eager"]) for name in cases]


if __name__ == "__main__":
    main(__doc__, measure, add_options, repeats=30, rehearsal={"tokens": 32, "repeats": 4, "buckets": [1, 8, 64]})
