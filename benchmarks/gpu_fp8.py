"""FP8 on the wire next to bf16, on the same buffer in one run: what the calls take, what crosses the links, what a
layer's forward + backward takes with quantisation included, and how close the kernels come to a device copy.

Expanded layout; times as in gpu_layer_cost.py (cases alternate; CUDA events, medians of the slowest rank; "alone"
from an idle GPU, "in a row" the mean of eight, layers all forward and then all backward).

    torchrun --nproc-per-node 8 benchmarks/gpu_fp8.py [--out benchmarks/results/h200x8/fp8.jsonl]
    torchrun --nproc-per-node 2 benchmarks/gpu_fp8.py --cpu              # a rehearsal on the reference buffer

Kinds of rows: `call` (one raw call of the buffer), `wire` (bytes of a dispatch to other ranks, by the routing and by
NVLink's counters), `layer`, `kernel`, and `projection`: the same layer where a rank's only way to the others is one
link of 50 or 100 GB/s. A projection is the sum over the layer's four calls of the longer of what the call took here and
bytes / speed, and what the kernels took.

Of a `kernel`, `us` is what it takes on the device, from a CUDA graph of many calls (`time_in_graphs`); `gb_s` and
`ratio` are of it, the copy is the faster of one in a graph and one launched eagerly. `eager_us` is a call launched from
Python, the mean of eight in a row: of small tensors, mostly what the host takes to launch it. The projection adds that
up, as the calls are timed, too.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.bench import link_counters
from megatron_ep_v2.bench.calls import FusedCalls, RawCalls
from megatron_ep_v2.bench.rows import ratio, timed
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.bench.shapes import PRESETS, TINY, Batch, Shape, make_batch, pairs_sent
from megatron_ep_v2.buffers.contract import Buffer
from megatron_ep_v2.fused_a2a import get_buffer
from megatron_ep_v2.wire.formats import FORMATS
from megatron_ep_v2.wire.quantize import from_wire, to_wire

SHAPES = PRESETS | {"tiny": TINY}
DTYPES = ("bf16", *FORMATS)
WIRES = (("bf16", "bf16"), ("fp8", "bf16"), *((name, name) for name in FORMATS))  # of the rows, of the gradients
LINKS_GB_S = (50, 100)
LARGE = (65536, 7168)  # rows, hidden: far beyond the caches
COUNTED_CALLS = 50
TOLERANCE = 0.08  # e4m3 against bf16, relative L2


def add_options(parser: argparse.ArgumentParser) -> None:
    shapes = ["qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank")


def measure(run: Run) -> Iterator[list[Row]]:
    for name in run.options.shapes:
        yield from measure_shape(SHAPES[name], run)
    rows, hidden = (256, 256) if run.cpu else LARGE
    large = torch.randn(rows, hidden, generator=run.generator(), device=run.device).bfloat16()
    yield measure_kernels("large", {"large": large}, run)


def measure_shape(shape: Shape, run: Run) -> Iterator[list[Row]]:
    """All rows of one shape, one kind after the other."""
    tokens = run.options.tokens
    batch = make_batch(shape, tokens, "balanced", torch.bfloat16, run.rank, run.device)
    settings.activate(chosen(("bf16", "bf16"), run))
    buffer = get_buffer(dist.group.WORLD, batch.hidden, batch.topk_idx, shape.experts)

    calls, delivered = raw_calls(buffer, batch, shape)
    times = run.time(calls)
    yield [{"kind": "call", "shape": shape.name, "call": name} | timed(times[name]) for name in calls]
    in_a_row = {name: timed(times[name])["in_a_row_us"] for name in calls}
    wire_rows = measure_wire(shape, calls, batch, run)
    yield wire_rows

    layers = {}
    for wire in WIRES:
        layers[f"{wire[0]} / {wire[1]}"] = FusedCalls(
            group=dist.group.WORLD,
            hidden=batch.hidden,
            grad_output=batch.grad_output,
            topk_idx=batch.topk_idx,
            probs=batch.weights,
            num_experts=shape.experts,
            do_expand=True,
            settings=chosen(wire, run),
        )
    errors = run.require_equal(layers, "bf16 / bf16", TOLERANCE)
    times = run.time(layers)
    rows: list[Row] = []
    for name, of_layer in times.items():
        speedups = {f"{kind}_speedup": ratio(times["bf16 / bf16"][kind], values) for kind, values in of_layer.items()}
        row = {"kind": "layer", "shape": shape.name, "rows / gradients": name, "ranks": run.ranks}
        row |= {"num_sms": buffer.num_sms, **timed(of_layer), **speedups}
        rows.append(row | {"relative_l2": round(errors[name], 5)})
    yield rows

    kernel_rows = measure_kernels(shape.name, {"sent": batch.hidden, "delivered": delivered}, run)
    yield kernel_rows
    yield project(shape.name, in_a_row, wire_rows, kernel_rows)
    megatron_ep_v2.destroy_buffers()


def chosen(wire: tuple[str, str], run: Run) -> settings.Settings:
    """These dtypes by name. One buffer serves them all: it is sized for bf16 in any case."""
    return settings.resolve(
        buffer=run.buffer,
        num_max_tokens_per_rank=run.options.tokens,
        dispatch_dtype=wire[0],
        grad_dispatch_dtype=wire[1],
    )


def raw_calls(buffer: Buffer, batch: Batch, shape: Shape) -> tuple[dict[str, Callable[[], object]], torch.Tensor]:
    """The four calls of a layer, dispatches for each dtype, with payloads that are quantised beforehand; and the rows
    that this rank receives in bf16."""
    layer = RawCalls(
        buffer=buffer,
        hidden=batch.hidden,
        grad_output=batch.hidden,
        topk_idx=batch.topk_idx,
        topk_weights=batch.weights,
        num_experts=shape.experts,
        do_expand=True,
    )
    rows, row_weights, handle = layer.dispatch()
    calls: dict[str, Callable[[], object]] = {
        "combine": lambda: layer.combine(rows, handle),
        "combine with weights": lambda: layer.combine_with_weights(rows, handle, row_weights),
    }
    for dtype in DTYPES:
        payload = to_wire(batch.hidden, dtype)
        sending = dataclasses.replace(layer, hidden=payload, grad_output=payload)
        calls[f"dispatch {dtype}"] = sending.dispatch
        calls[f"cached dispatch {dtype}"] = lambda sending=sending: sending.cached_dispatch(handle)
    return calls, rows


def measure_wire(shape: Shape, calls: dict[str, Callable[[], object]], batch: Batch, run: Run) -> list[Row]:
    """Bytes that one dispatch sends to other ranks: values and scales of each row, once to a rank."""
    to_rank = pairs_sent(batch.topk_idx, shape.experts, run.ranks)
    num_rows = int(to_rank.sum() - to_rank[run.rank])
    counted_calls = 1 if run.cpu else COUNTED_CALLS
    rows: list[Row] = []
    for dtype in DTYPES:
        payload = to_wire(batch.hidden, dtype)
        row_bytes = sum(part[0].nbytes for part in (payload if isinstance(payload, tuple) else (payload,)))
        before, _ = link_counters.read()
        for _ in range(counted_calls):
            calls[f"dispatch {dtype}"]()
        if not run.cpu:
            torch.cuda.synchronize()
        dist.barrier()
        after, unread = link_counters.read()
        counted = {
            name: round(value / counted_calls) for name, value in link_counters.difference(before, after).items()
        }
        row = {"kind": "wire", "shape": shape.name, "dtype": dtype, "rows": num_rows, "bytes": num_rows * row_bytes}
        base = rows[0] if rows else row
        row |= {"ratio": round(row["bytes"] / base["bytes"], 4), **counted, "counters": unread or "read"}
        if base.get("nvlink_tx_bytes"):
            row["counted_ratio"] = round(row["nvlink_tx_bytes"] / base["nvlink_tx_bytes"], 4)
        rows.append(row)
    return rows


def measure_kernels(shape: str, inputs: dict[str, torch.Tensor], run: Run) -> list[Row]:
    """Quantisation and dequantisation next to a device copy that moves as many bytes."""
    rows = []
    for where, x in inputs.items():
        for dtype in ("fp8", "mxfp8"):
            payload = to_wire(x, dtype)
            moved = x.nbytes + sum(part.nbytes for part in payload)  # each read or written once
            source = torch.empty(moved // 2, dtype=torch.uint8, device=run.device)
            target = torch.empty_like(source)
            runs: dict[str, Callable[[], object]] = {
                "quantize": lambda x=x, dtype=dtype: to_wire(x, dtype),
                "dequantize": lambda payload=payload, dtype=dtype: from_wire(payload, dtype, torch.bfloat16),
                "copy": lambda source=source, target=target: target.copy_(source),
            }
            times, eager = run.time_kernels(runs)
            speed = {name: moved / times[name] / 1e3 for name in runs}  # GB/s
            for name in ("quantize", "dequantize"):
                row = {"kind": "kernel", "shape": shape, "rows": len(x), "place": where, "dtype": dtype, "kernel": name}
                row |= {"us": round(times[name], 1), "eager_us": round(eager[name], 1)}
                row["gb_s"] = round(speed[name])
                rows.append(row | {"copy_gb_s": round(speed["copy"]), "ratio": round(speed[name] / speed["copy"], 3)})
    return rows


def project(
    shape: str,
    calls: dict[str, float],
    wire_rows: list[Row],
    kernel_rows: list[Row],
) -> list[Row]:
    """See the module's docstring. A combine sends back as many rows in bf16 as the dispatch sent.

    Args:
        calls: Microseconds of each raw call, in a row.
    """
    sent = {row["dtype"]: row["bytes"] for row in wire_rows}
    kernels = {(row["dtype"], row["place"], row["kernel"]): row["eager_us"] for row in kernel_rows}
    rows = []
    for speed in LINKS_GB_S:

        def on_link(call: str, num_bytes: int, speed: int = speed) -> float:
            return max(calls[call], num_bytes / speed / 1e3)

        totals = {}
        for forward, backward in WIRES:
            total = on_link("combine", sent["bf16"]) + on_link("combine with weights", sent["bf16"])
            total += on_link(f"dispatch {forward}", sent[forward])
            total += on_link(f"cached dispatch {backward}", sent[backward])
            for dtype in (forward, backward):
                if dtype != "bf16":
                    total += kernels[dtype, "sent", "quantize"] + kernels[dtype, "delivered", "dequantize"]
            totals[f"{forward} / {backward}"] = total
        for name, total in totals.items():
            row = {"kind": "projection", "shape": shape, "link_gb_s": speed, "rows / gradients": name}
            rows.append(row | {"us": round(total), "speedup": round(totals["bf16 / bf16"] / total, 3)})
    return rows


if __name__ == "__main__":
    main(__doc__, measure, add_options, repeats=30, rehearsal={"shapes": ["tiny"], "tokens": 64, "repeats": 4})
