"""What this package adds to DeepEP: fused_dispatch + fused_combine, forward and backward, next to the four raw calls of
deep_ep's ElasticBuffer on the same buffer, in one run.

The four raw calls of a layer are dispatch, combine, cached dispatch (combine's backward), combine with weights
(dispatch's backward). Experts pass rows through; variants alternate; times are CUDA events, medians over repeats of the
slowest rank: of eight layers in a row (all forward, then all backward), and of one layer on an idle GPU.

    torchrun --nproc-per-node 8 benchmarks/gpu_layer_cost.py [--out benchmarks/results/h200x8/layer_cost.jsonl]
    torchrun --nproc-per-node 2 benchmarks/gpu_layer_cost.py --cpu       # a rehearsal on the reference buffer
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.bench.calls import FusedCalls, Layer, RawCalls, unwrapped
from megatron_ep_v2.bench.rows import timed
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.bench.shapes import PRESETS, TINY, make_batch
from megatron_ep_v2.fused_a2a import get_buffer

SHAPES = PRESETS | {"tiny": TINY}


def add_options(parser: argparse.ArgumentParser) -> None:
    shapes = ["qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank")


def line(row: Row) -> str:
    return (
        f"{row['shape']:<16} {row['layout']:<9} {row['variant']:<22}"
        f"  alone {row['alone_us']:>6.0f} us {row['alone_ratio']:.3f}"
        f"  in a row {row['in_a_row_us']:>6.0f} us {row['in_a_row_ratio']:.3f}"
    )


class Asynchronous:
    """deep_ep's own buffer, each call waiting for an event of the current stream, allocating on the communication
    stream, and waited for right after it."""

    def __init__(self, buffer: Any):  # of a class without types
        self.buffer = buffer

    def dispatch(self, *arguments: Any, **more: Any) -> Any:
        return self._waited_for(self.buffer.dispatch, *arguments, **more)

    def combine(self, *arguments: Any, **more: Any) -> Any:
        return self._waited_for(self.buffer.combine, *arguments, **more)

    def _waited_for(self, call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        more |= {"previous_event": self.buffer.capture(), "async_with_compute_stream": True}
        answer = call(*arguments, **more, allocate_on_comm_stream=True)
        answer[-1].current_stream_wait()
        return answer


def measure(run: Run) -> Iterator[list[Row]]:
    tokens = run.options.tokens
    settings.activate(settings.resolve(buffer=run.buffer, num_max_tokens_per_rank=tokens))
    for name in run.options.shapes:
        shape = SHAPES[name]
        batch = make_batch(shape, tokens, "balanced", torch.bfloat16, run.rank, run.device)
        buffer = get_buffer(dist.group.WORLD, batch.hidden, batch.topk_idx, shape.experts)
        for layout in ("compact", "expanded"):
            layer: dict[str, Any] = {
                "hidden": batch.hidden,
                "grad_output": batch.grad_output,
                "topk_idx": batch.topk_idx,
                "num_experts": shape.experts,
                "do_expand": layout == "expanded",
            }
            raw: dict[str, Any] = {"buffer": unwrapped(buffer), "topk_weights": batch.weights, **layer}
            raw["num_sms"] = buffer.num_sms
            cases: dict[str, Layer[Any]] = {"four raw calls": RawCalls(**raw)}
            if not run.cpu:
                cases["four raw calls, async"] = RawCalls(**raw | {"buffer": Asynchronous(raw["buffer"])})
            cases["fused"] = FusedCalls(group=dist.group.WORLD, probs=batch.weights, **layer)
            run.require_equal(cases, "four raw calls", 5e-3)
            times = run.time(cases, warmup=5)
            yield [
                {
                    "shape": name,
                    "layout": layout,
                    "variant": variant,
                    "tokens_per_rank": tokens,
                    "ranks": run.ranks,
                    "num_sms": buffer.num_sms,
                    **timed(times[variant], times["four raw calls"]),
                }
                for variant in cases
            ]
        megatron_ep_v2.destroy_buffers()


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        add_options,
        line=line,
        repeats=30,
        rehearsal={"shapes": ["tiny"], "tokens": 64, "repeats": 4},
    )
