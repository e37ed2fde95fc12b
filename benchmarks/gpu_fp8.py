"""FP8 on the wire beside bf16, on the same buffer in one run: what the calls take, what crosses the links, what a
layer's forward + backward takes with quantisation included, and how close the kernels come to a device copy.

Expanded layout; times as in gpu_layer_cost.py (variants alternate; CUDA events, medians of the slowest rank; "alone"
from an idle GPU, "in a row" the mean of eight, layers all forward and then all backward).

    torchrun --nproc-per-node 8 benchmarks/gpu_fp8.py [--out benchmarks/results/h200x8/fp8.jsonl]

Kinds of rows: `call` (one raw call of the buffer), `wire` (bytes of a dispatch to other ranks, by the routing and by
NVLink's counters), `layer`, `kernel`, and `projection`: the same layer where a rank's only way to the others is one
link of 50 or 100 GB/s. A projection is the sum over the layer's four calls of the longer of what the call took here and
bytes / speed, and what the kernels took.

Of a `kernel`, `us` is what it takes on the device, from a CUDA graph of many calls (`common.graph_times`); `gb_s` and
`ratio` are of it, the copy is the faster of one in a graph and one launched eagerly. `eager_us` is a call launched from
Python, the mean of eight in a row: of small tensors, mostly what the host takes to launch it. The projection adds that
up, as the calls are timed, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Results, graph_times
from gpu_layer_cost import SHAPES, Layer, fused_layer, time_variants

import megatron_ep_v2
from megatron_ep_v2 import links, settings
from megatron_ep_v2.fused_a2a import get_buffer
from megatron_ep_v2.wire.quantize import from_wire, to_wire

DTYPES = ("bf16", "fp8", "mxfp8")
WIRES = (("bf16", "bf16"), ("fp8", "bf16"), ("fp8", "fp8"), ("mxfp8", "mxfp8"))  # of the rows, of the gradients
LINKS_GB_S = (50, 100)
LARGE = (65536, 7168)  # rows, hidden: far beyond the caches
COUNTED_CALLS = 50

Run = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))

    results = Results(options.out, "gpu_fp8.py")
    for shape in options.shapes:
        for rows in measure(shape, options):
            results.add(rows)
    large = {"large": torch.randn(LARGE, device="cuda").bfloat16()}
    results.add(measure_kernels("large", large, options.repeats))
    results.finish()
    megatron_ep_v2.destroy_buffers()
    dist.destroy_process_group()


def measure(shape: str, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """All rows of one shape, one kind after the other."""
    hidden, experts, topk = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    x = torch.randn(options.tokens, hidden, generator=generator, device="cuda").bfloat16()
    grad = torch.randn(options.tokens, hidden, generator=generator, device="cuda").bfloat16()
    top = torch.rand(options.tokens, experts, generator=generator, device="cuda").topk(topk, dim=1)
    picks, probs = top.indices, top.values.contiguous()
    settings.activate(chosen(("bf16", "bf16"), options.tokens))
    buffer = get_buffer(dist.group.WORLD, x, picks, experts)

    calls = raw_calls(buffer, x, picks, probs, experts)
    medians = median_times(calls, options.repeats)
    yield [{"kind": "call", "shape": shape, "call": name} | medians[name] for name in calls]
    wire_rows = measure_wire(shape, calls, x, picks, experts)
    yield wire_rows

    layers = {f"{wire[0]} / {wire[1]}": layer(wire, x, grad, picks, probs, experts) for wire in WIRES}
    errors = compare(layers)
    layer_times = median_times(layers, options.repeats)
    base = layer_times["bf16 / bf16"]
    rows: list[dict[str, Any]] = []
    for name, times in layer_times.items():
        ratios = {
            f"{kind}_speedup": round(base[f"{kind}_us"] / times[f"{kind}_us"], 3) for kind in ("alone", "in_a_row")
        }
        row = {"kind": "layer", "shape": shape, "rows / gradients": name, "ranks": dist.get_world_size()}
        rows.append(row | {"num_sms": buffer.num_sms} | times | ratios | {"relative_l2": errors[name]})
    yield rows

    delivered = buffer.dispatch(x, topk_idx=picks, topk_weights=probs, num_experts=experts, do_expand=True)[0]
    kernel_rows = measure_kernels(shape, {"sent": x, "delivered": delivered}, options.repeats)
    yield kernel_rows
    yield project(shape, medians, wire_rows, kernel_rows)
    megatron_ep_v2.destroy_buffers()


def chosen(wire: tuple[str, str], tokens: int) -> settings.Settings:
    """These dtypes by name, for so many tokens. One buffer serves them all: it is sized for bf16 in any case."""
    return settings.resolve(
        buffer="elastic",
        num_max_tokens_per_rank=tokens,
        dispatch_dtype=wire[0],
        grad_dispatch_dtype=wire[1],
    )


def raw_calls(buffer: Any, x: torch.Tensor, picks: torch.Tensor, probs: torch.Tensor, experts: int) -> dict[str, Run]:
    """The four calls of a layer, dispatches for each dtype; payloads are quantised beforehand."""
    first = {"topk_idx": picks, "topk_weights": probs, "num_experts": experts, "do_expand": True}
    rows, _, row_probs, handle, _ = buffer.dispatch(x, **first)
    again = {"handle": handle, "num_sms": handle.num_sms, "do_expand": True}
    calls: dict[str, Run] = {
        "combine": lambda: buffer.combine(rows, handle, num_sms=handle.num_sms),
        "combine with weights": lambda: buffer.combine(rows, handle, row_probs, num_sms=handle.num_sms),
    }
    for dtype in DTYPES:
        payload = to_wire(x, dtype)
        calls[f"dispatch {dtype}"] = lambda payload=payload: buffer.dispatch(payload, **first)
        calls[f"cached dispatch {dtype}"] = lambda payload=payload: buffer.dispatch(payload, **again)
    return calls


def layer(
    wire: tuple[str, str],
    x: torch.Tensor,
    grad: torch.Tensor,
    picks: torch.Tensor,
    probs: torch.Tensor,
    experts: int,
) -> Layer:
    """Forward and backward of dispatch and combine, quantisation included; experts pass rows through."""
    plain, own_settings = fused_layer(x, grad, picks, probs, experts, True), chosen(wire, len(x))

    def forward() -> Any:
        settings.activate(own_settings)
        return plain.forward()

    return Layer(forward, plain.backward)


def compare(layers: dict[str, Run]) -> dict[str, float]:
    """The largest relative L2 difference from bf16 of output and gradients; it must be e4m3's."""
    outputs = {name: run() for name, run in layers.items()}
    exact = outputs["bf16 / bf16"]
    errors = {}
    for name, output in outputs.items():
        pairs = zip(output, exact, strict=True)
        errors[name] = round(max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs), 5)
        assert errors[name] < 0.08, f"{name} is off by {errors[name]}"
    return errors


def measure_wire(
    shape: str, calls: dict[str, Run], x: torch.Tensor, picks: torch.Tensor, experts: int
) -> list[dict[str, Any]]:
    """Bytes that one dispatch sends to other ranks: values and scales of each row, once to a rank."""
    to_rank = torch.zeros(len(picks), dist.get_world_size(), dtype=torch.bool, device="cuda")
    to_rank.scatter_(1, picks // (experts // dist.get_world_size()), True)
    to_rank[:, dist.get_rank()] = False
    num_rows = int(to_rank.sum())
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        payload = to_wire(x, dtype)
        row_bytes = sum(part[0].nbytes for part in (payload if isinstance(payload, tuple) else (payload,)))
        before, _ = links.read()
        for _ in range(COUNTED_CALLS):
            calls[f"dispatch {dtype}"]()
        torch.cuda.synchronize()
        dist.barrier(device_ids=[torch.cuda.current_device()])
        after, unread = links.read()
        counted = {name: round(value / COUNTED_CALLS) for name, value in links.difference(before, after).items()}
        row = {"kind": "wire", "shape": shape, "dtype": dtype, "rows": num_rows, "bytes": num_rows * row_bytes}
        base = rows[0] if rows else row
        row |= {"ratio": round(row["bytes"] / base["bytes"], 4), **counted, "counters": unread or "read"}
        if base.get("nvlink_tx_bytes"):
            row["counted_ratio"] = round(row["nvlink_tx_bytes"] / base["nvlink_tx_bytes"], 4)
        rows.append(row)
    return rows


def measure_kernels(shape: str, inputs: dict[str, torch.Tensor], repeats: int) -> list[dict[str, Any]]:
    """Quantisation and dequantisation beside a device copy that moves as many bytes."""
    rows = []
    for place, x in inputs.items():
        for dtype in ("fp8", "mxfp8"):
            payload = to_wire(x, dtype)
            moved = x.nbytes + sum(part.nbytes for part in payload)  # each read or written once
            source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
            target = torch.empty_like(source)
            runs: dict[str, Run] = {
                "quantize": lambda x=x, dtype=dtype: to_wire(x, dtype),
                "dequantize": lambda payload=payload, dtype=dtype: from_wire(payload, dtype, torch.bfloat16),
                "copy": lambda source=source, target=target: target.copy_(source),
            }
            eager, times = median_times(runs, repeats), graph_times(runs, repeats)
            times["copy"] = min(times["copy"], eager["copy"]["in_a_row_us"])  # large ones are slower in a graph
            speed = {name: moved / times[name] / 1e3 for name in runs}  # GB/s
            for name in ("quantize", "dequantize"):
                row = {"kind": "kernel", "shape": shape, "rows": len(x), "place": place, "dtype": dtype, "kernel": name}
                row |= {"us": round(times[name], 1), "eager_us": eager[name]["in_a_row_us"]}
                row["gb_s"] = round(speed[name])
                rows.append(row | {"copy_gb_s": round(speed["copy"]), "ratio": round(speed[name] / speed["copy"], 3)})
    return rows


def project(
    shape: str,
    calls: dict[str, dict[str, float]],
    wire_rows: list[dict[str, Any]],
    kernel_rows: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """See the module's docstring. A combine sends back as many rows in bf16 as the dispatch sent."""
    sent = {row["dtype"]: row["bytes"] for row in wire_rows}
    kernels = {(row["dtype"], row["place"], row["kernel"]): row["eager_us"] for row in kernel_rows}
    rows = []
    for speed in LINKS_GB_S:

        def on_link(call: str, num_bytes: int, speed: int = speed) -> float:
            return max(calls[call]["in_a_row_us"], num_bytes / speed / 1e3)

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


def median_times(runs: dict[str, Run], repeats: int) -> dict[str, dict[str, float]]:
    """Run -> alone_us and in_a_row_us."""
    return {
        name: {f"{kind}_us": round(statistics.median(values), 1) for kind, values in by_kind.items()}
        for name, by_kind in time_variants(runs, repeats).items()
    }


if __name__ == "__main__":
    main()
