"""What the host wait costs: one MoE layer of SwiGLU experts (torch's grouped GEMM), forward + backward, in the expanded
layout, sync-free, and sync-free in a CUDA graph; then decode, eagerly and in a graph for each bucket.

Variants alternate; times are medians over repeats of the slowest rank. "alone" starts on an idle GPU, as after a wait
somewhere else; "in a row" is the mean of several layers without a pause. Outputs and gradients are compared before
anything is timed.

    torchrun --nproc-per-node 8 benchmarks/gpu_sync_free.py [--out benchmarks/results/h200x8/sync_free.jsonl]
    torchrun --nproc-per-node 2 benchmarks/gpu_sync_free.py --cpu    # a rehearsal on the reference buffer, no graphs
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Results

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.device_checks import read_all
from megatron_ep_v2.layouts import gather_rows, gather_weights, place_contiguous, reduce_rows, rows_that_fit
from megatron_ep_v2.serving import Decode, DecodeGraphs, PrepareFinalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "gpu"))
from sync_free_layers import Layer, Sizes, errors

Variants = dict[str, Callable[[], Any]]
TOLERANCE = 1.5e-2  # relative L2 in bf16
IN_A_ROW = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on gloo, to see that it runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    limit = datetime.timedelta(seconds=120)
    if options.cpu:
        device, sizes, kind = torch.device("cpu"), Sizes(32, 256, 32, 8, 3), "reference"
        dist.init_process_group("gloo", timeout=limit)
    else:
        device, sizes, kind = torch.device("cuda", int(os.environ["LOCAL_RANK"])), Sizes(options.tokens), "elastic"
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=limit)
    settings.activate(settings.resolve(buffer=kind, num_max_tokens_per_rank=max(sizes.tokens, *options.buckets)))
    results = Results(options.out, "gpu_sync_free.py")
    results.add(measure_layer(sizes, device, options.repeats))
    for rows in measure_decode(sizes, device, options):
        results.add(rows)
    results.finish()
    megatron_ep_v2.destroy_buffers()
    dist.destroy_process_group()


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def measure_layer(sizes: Sizes, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    layer = Layer(sizes, dist.group.WORLD, device)
    variants: Variants = {
        "expanded": lambda: layer.step(layer.expanded),
        "sync-free": lambda: layer.step(layer.sync_free),
    }
    if device.type == "cuda":
        say("capturing the layer")
        graph, results = layer.capture()
        variants["sync-free, graph"] = lambda: graph.replay() or results
    expected = {name: tensor.clone() for name, tensor in variants["expanded"]().items()}
    for name, run in variants.items():
        for tensor, error in errors(run(), expected).items():
            assert error < TOLERANCE, f"{name} disagrees about {tensor} by {error:.1e}"
    read_all()  # nothing was left out
    say("timing the layer")
    facts = {"what": "layer, forward + backward", "tokens_per_rank": sizes.tokens}
    return rows_of(time_variants(variants, device, repeats), "expanded", facts)


def measure_decode(sizes: Sizes, device: torch.device, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows of one bucket after the other."""
    group = dist.group.WORLD
    megatron_ep_v2.destroy_buffers()
    most = max(options.buckets)
    settings.activate(settings.resolve(buffer=settings.active().buffer, num_max_tokens_per_rank=most))
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
        """Rows to their experts' places and back; each expert passes them through."""
        places = place_contiguous(
            work.topk_idx, work.num_recv, local, rows_that_fit(work.topk_idx.numel(), local, 1), 1
        )
        rows = gather_rows(work.rows, places) * gather_weights(work.topk_weights, places)[:, None]
        return reduce_rows(rows.bfloat16(), places)

    graphs = DecodeGraphs(pair, experts, device)
    for bucket in options.buckets:
        say(f"decode, bucket {bucket}")
        generator = torch.Generator(device).manual_seed(bucket * 64 + group.rank())
        x = torch.randn(bucket, sizes.hidden, generator=generator, device=device).bfloat16()
        scores = torch.rand(bucket, sizes.experts, generator=generator, device=device)
        weights, picks = scores.topk(sizes.topk, dim=1)

        def eager(given: Any = (x, picks, weights), bucket: int = bucket) -> torch.Tensor:
            return pair.finalize(experts(pair.prepare_decode(*given, bucket=bucket)))

        def replay(given: Any = (x, picks, weights), bucket: int = bucket) -> torch.Tensor:
            return graphs(*given, bucket=bucket)

        variants: Variants = {"eager": eager, "graph": replay}
        expected = {"y": x.double() * weights.sum(dim=1, keepdim=True).double()}
        for name, run in variants.items():
            error = errors({"y": run()}, expected)["y"]
            assert error < TOLERANCE, f"decode, {name}, bucket {bucket} is wrong by {error:.1e}"
        facts = {"what": "decode: prepare, places, finalize", "bucket": bucket}
        yield rows_of(time_variants(variants, device, options.repeats), "eager", facts)


def time_variants(variants: Variants, device: torch.device, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds of one call, of the slowest rank, for each repeat."""
    for run in variants.values():
        for _ in range(3):
            run()
    times: dict[str, dict[str, list[float]]] = {name: {"alone": [], "in_a_row": []} for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            for kind, count in (("alone", 1), ("in_a_row", IN_A_ROW)):
                times[name][kind].append(_time(run, count, device) / count)
    for by_kind in times.values():
        for kind, values in by_kind.items():
            slowest = torch.tensor(values, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            by_kind[kind] = slowest.tolist()
    return times


def _time(run: Callable[[], Any], count: int, device: torch.device) -> float:
    if device.type == "cpu":
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - begin) * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    dist.barrier(device_ids=[torch.cuda.current_device()])
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def rows_of(times: dict[str, dict[str, list[float]]], base: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, by_kind in times.items():
        row: dict[str, Any] = {**facts, "variant": name, "ranks": dist.get_world_size()}
        for kind, values in by_kind.items():
            quintiles = statistics.quantiles(values, n=5)
            row |= {
                f"{kind}_us": round(statistics.median(values), 1),
                f"{kind}_p20_us": round(quintiles[0], 1),
                f"{kind}_p80_us": round(quintiles[3], 1),
                f"{kind}_ratio": round(statistics.median(values) / statistics.median(times[base][kind]), 4),
            }
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
