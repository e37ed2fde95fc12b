"""What this package adds to DeepEP: fused_dispatch + fused_combine, forward and backward, beside the four raw calls of
deep_ep's ElasticBuffer on the same buffer, in one run.

The four raw calls of a layer are dispatch, combine, cached dispatch (combine's backward), combine with weights
(dispatch's backward). Experts pass rows through; variants alternate; times are CUDA events, medians over repeats of the
slowest rank: of eight layers in a row (all forward, then all backward), and of one layer on an idle GPU.

    torchrun --nproc-per-node 8 benchmarks/gpu_layer_cost.py [--out benchmarks/results/h200x8/layer_cost.jsonl]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Results

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch, get_buffer

SHAPES = {  # hidden, experts, top-k
    "qwen3-30b-a3b": (2048, 128, 8),
    "qwen3-235b-a22b": (4096, 128, 8),
    "deepseek-v3": (7168, 256, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    settings.activate(settings.resolve(buffer="elastic", num_max_tokens_per_rank=options.tokens))

    results = Results(options.out, "gpu_layer_cost.py")
    for shape in options.shapes:
        results.add(_measure(shape, options), _line)
    results.finish()
    megatron_ep_v2.destroy_buffers()
    dist.destroy_process_group()


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['shape']:<16} {row['layout']:<9} {row['variant']:<22}"
        f"  alone {row['alone_us']:>6.0f} us {row['alone_ratio']:.3f}"
        f"  in a row {row['in_a_row_us']:>6.0f} us {row['in_a_row_ratio']:.3f}"
    )


def _measure(shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    hidden, experts, topk = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    x = torch.randn(options.tokens, hidden, generator=generator, device="cuda").bfloat16()
    grad = torch.randn(options.tokens, hidden, generator=generator, device="cuda").bfloat16()
    top = torch.rand(options.tokens, experts, generator=generator, device="cuda").topk(topk, dim=1)
    picks, probs = top.indices, top.values.contiguous()
    buffer = get_buffer(dist.group.WORLD, x, picks, experts)
    rows = []
    for layout in ("compact", "expanded"):
        expand = layout == "expanded"
        raw = _raw(buffer._buffer, x, grad, picks, probs, experts, buffer.num_sms, expand)
        variants = {
            "four raw calls": raw(False),
            "four raw calls, async": raw(True),
            "fused": fused_layer(x, grad, picks, probs, experts, expand),
        }
        outputs = {name: run() for name, run in variants.items()}
        reference = outputs["four raw calls"]
        for name, output in outputs.items():
            for mine, theirs in zip(output, reference, strict=True):
                error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
                assert error < 5e-3, f"{name} disagrees with the raw calls by {error:.1e}"
        del outputs, reference
        times = time_variants(variants, options.repeats)
        for name, by_kind in times.items():
            row: dict[str, Any] = {
                "shape": shape,
                "layout": layout,
                "variant": name,
                "tokens_per_rank": options.tokens,
                "ranks": dist.get_world_size(),
                "num_sms": buffer.num_sms,
            }
            for kind, values in by_kind.items():
                base = statistics.median(times["four raw calls"][kind])
                quintiles = statistics.quantiles(values, n=5)
                row |= {
                    f"{kind}_us": round(statistics.median(values), 1),
                    f"{kind}_p20_us": round(quintiles[0], 1),
                    f"{kind}_p80_us": round(quintiles[3], 1),
                    f"{kind}_ratio": round(statistics.median(values) / base, 4),
                }
            rows.append(row)
    megatron_ep_v2.destroy_buffers()
    return rows


@dataclass(frozen=True)
class Layer:
    """A layer in two halves. `forward()` returns what its backward needs; `backward(states)` runs the backwards of
    several forwards, the last one first, and returns output and gradients of the first. Called, it is both, once."""

    forward: Callable[[], Any]
    backward: Callable[[list[Any]], tuple[torch.Tensor, ...]]

    def __call__(self) -> tuple[torch.Tensor, ...]:
        return self.backward([self.forward()])


def _raw(
    raw: Any,
    x: torch.Tensor,
    grad: torch.Tensor,
    picks: torch.Tensor,
    probs: torch.Tensor,
    experts: int,
    num_sms: int,
    expand: bool,
) -> Callable[[bool], Layer]:
    def ordered(asynchronous: bool) -> dict[str, Any]:
        """Asynchronous: an event before, memory on the communication stream, and a wait right behind."""
        if not asynchronous:
            return {}
        return {
            "previous_event": raw.capture(),
            "async_with_compute_stream": True,
            "allocate_on_comm_stream": True,
        }

    def wait(event: Any, asynchronous: bool) -> None:
        if asynchronous:
            event.current_stream_wait()

    def variant(asynchronous: bool) -> Layer:
        def forward() -> Any:
            rows, _, row_probs, handle, event = raw.dispatch(
                x,
                topk_idx=picks,
                topk_weights=probs,
                num_experts=experts,
                num_sms=num_sms,
                do_expand=expand,
                **ordered(asynchronous),
            )
            wait(event, asynchronous)
            y, _, event = raw.combine(rows, handle, **ordered(asynchronous))
            wait(event, asynchronous)
            return y, row_probs, handle

        def backward(states: list[Any]) -> tuple[torch.Tensor, ...]:
            while states:
                y, row_probs, handle = states.pop()
                grad_rows, _, _, _, event = raw.dispatch(
                    grad, handle=handle, num_sms=handle.num_sms, do_expand=expand, **ordered(asynchronous)
                )
                wait(event, asynchronous)
                grad_x, grad_probs, event = raw.combine(
                    grad_rows, handle, topk_weights=row_probs, **ordered(asynchronous)
                )
                wait(event, asynchronous)
            return y, grad_x, grad_probs

        return Layer(forward, backward)

    return variant


def fused_layer(
    x: torch.Tensor, grad: torch.Tensor, picks: torch.Tensor, probs: torch.Tensor, experts: int, expand: bool
) -> Layer:
    """fused_dispatch and fused_combine around experts that pass rows through; the probabilities get gradients too."""

    def forward() -> Any:
        leaves = x.detach().requires_grad_(), probs.detach().requires_grad_()  # gradients of layers are not added up
        rows, _, row_probs, _, handle = fused_dispatch(
            leaves[0], picks, leaves[1], experts, dist.group.WORLD, True, True, do_expand=expand
        )
        y, _ = fused_combine(rows, dist.group.WORLD, handle, True, True)
        return leaves, y, row_probs

    def backward(states: list[Any]) -> tuple[torch.Tensor, ...]:
        ends = [end for _, y, row_probs in states for end in (y, row_probs)]
        torch.autograd.backward(ends, [g for *_, row_probs in states for g in (grad, row_probs.detach())])
        (own_x, own_probs), y, _ = states[0]
        return y.detach(), own_x.grad, own_probs.grad

    return Layer(forward, backward)


IN_A_ROW = 8


def time_variants(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds of one call, of the slowest rank, for each repeat: "alone", from an idle GPU, where host work before
    the first kernel shows; and "in_a_row", the mean of several without a pause. Of a `Layer`, all are run forward and
    then backward, as in training: autograd hands a backward over to a thread of its own once, not in each layer."""
    for run in variants.values():
        for _ in range(5):
            run()
    times: dict[str, dict[str, list[float]]] = {name: {"alone": [], "in_a_row": []} for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            for kind, count in (("alone", 1), ("in_a_row", IN_A_ROW)):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                dist.barrier(device_ids=[torch.cuda.current_device()])
                torch.cuda.synchronize()
                start.record()
                if isinstance(run, Layer):
                    run.backward([run.forward() for _ in range(count)])
                else:
                    for _ in range(count):
                        run()
                end.record()
                end.synchronize()
                times[name][kind].append(start.elapsed_time(end) * 1e3 / count)
    for by_kind in times.values():
        for kind, values in by_kind.items():
            slowest = torch.tensor(values, device="cuda")
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            by_kind[kind] = slowest.tolist()
    return times


if __name__ == "__main__":
    main()
