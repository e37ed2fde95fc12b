"""What this package costs the host in one MoE layer, forward and backward: on any machine, with nothing behind it.

The four calls of a layer (dispatch, combine, cached dispatch, combine with weights) are made on a stand-in for the
buffer of deep_ep that answers at once, with tensors of the `meta` device, which have shapes and no data. What is left
is the time of Python and of autograd, which is what a GPU waits for where a layer starts on an idle one.

    stub                the four calls on the stand-in itself
    elastic, watched    on our ElasticBuffer around it; and with the watchdog's record
    minimal autograd    two autograd functions that do nothing, on the same tensors: the least that a layer with
                        gradients can cost
    fused on ...        fused_dispatch and fused_combine on these buffers, forward and backward

With `--device cuda` the tensors are on a GPU, so that what the watchdog queues there counts, and so does autograd's way
to the device's thread and back.

    python benchmarks/host_cost.py [--device cuda] [--out benchmarks/results/host_cost.jsonl]
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from common import environment, write_rows

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import elastic, pool
from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.watchdog.rendezvous import Rendezvous
from megatron_ep_v2.watchdog.watched_buffer import watch

TOKENS, HIDDEN, TOPK, EXPERTS, LOCAL_EXPERTS, ROWS = 4096, 2048, 8, 128, 16, 32768  # of one rank of eight
SPEC = BufferSpec(num_max_tokens_per_rank=TOKENS, hidden=HIDDEN, num_topk=TOPK, num_experts=EXPERTS)
LAYERS = 20  # timed together: short, so that on a busy machine most rounds are not interrupted


class Tensors:
    """What goes through a layer."""

    def __init__(self, device: str):
        self.x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
        self.picks = torch.zeros(TOKENS, TOPK, dtype=torch.int64, device=device)
        self.probs = torch.zeros(TOKENS, TOPK, device=device)
        self.rows = torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16, device=device)
        self.row_probs = torch.zeros(ROWS, device=device)
        self.leaves = self.x.clone().requires_grad_(), self.probs.clone().requires_grad_()
        self.gradients = [self.x.clone(), self.row_probs.clone()]


class Handle(SimpleNamespace):
    """With what the callers read of deep_ep's."""


def make_stub(given: Tensors) -> Any:
    """A class in the place of deep_ep.ElasticBuffer. Its answers are new tensors each time, as the real ones are."""
    counts = [ROWS // LOCAL_EXPERTS] * LOCAL_EXPERTS

    class Stub:
        num_bytes, num_allocated_qps = 0, 0

        def __init__(self, group: Any, **options: Any):
            pass

        def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
            return 14

        def get_comm_stream(self) -> None:
            """None: its calls run on the current stream."""

        def dispatch(  # with deep_ep's parameters, since taking them costs something too
            self,
            x: Any,
            topk_idx: Any = None,
            topk_weights: Any = None,
            num_experts: Any = None,
            num_max_tokens_per_rank: Any = None,
            expert_alignment: Any = None,
            num_sms: int = 0,
            previous_event: Any = None,
            async_with_compute_stream: bool = False,
            allocate_on_comm_stream: bool = False,
            handle: Any = None,
            do_cpu_sync: Any = None,
            do_expand: bool = False,
            do_zero_padding: bool = False,
        ) -> Any:
            if handle is not None:
                return given.rows.detach(), None, None, handle, None
            handle = Handle(
                num_recv_tokens_per_expert_list=counts,
                do_expand=True,
                expert_alignment=1,
                num_sms=14,
                topk_idx=given.picks,
                num_experts=EXPERTS,
                num_expanded_tokens=ROWS,
            )
            return given.rows.detach(), None, given.row_probs.detach(), handle, None

        def combine(
            self,
            x: Any,
            handle: Any,
            topk_weights: Any = None,
            num_sms: int = 0,
            previous_event: Any = None,
            async_with_compute_stream: bool = False,
            allocate_on_comm_stream: bool = False,
        ) -> Any:
            return given.x.detach(), None if topk_weights is None else given.probs.detach(), None

        def destroy(self) -> None:
            pass

    return Stub


class AnyDeviceBuffer(elastic.ElasticBuffer):
    """Takes rows without data."""

    def _check_rows(self, rows: torch.Tensor, dtype: torch.dtype) -> None:
        assert rows.dtype == dtype and rows.is_meta and rows.shape[1] == self.spec.hidden


def make_buffers(device: str, stub: Any) -> dict[str, Any]:
    """Each in a process group of its own, as the pool keeps them."""
    elastic.import_deep_ep = lambda: SimpleNamespace(ElasticBuffer=stub)
    kind = elastic.ElasticBuffer if device == "cuda" else AnyDeviceBuffer
    buffers: dict[str, Any] = {"stub": stub(None)}
    for name in ("elastic", "watched"):
        group = dist.new_group()
        buffer: Any = kind(group, SPEC, settings.active(), ["here"])
        if name == "watched":
            rendezvous = Rendezvous(group, settings.active().watchdog_secs)
            rendezvous.listener = socket.create_server(("localhost", 0))  # which a group of one rank has no need of
            rendezvous.address = (*rendezvous.listener.getsockname()[:2], "nobody asks")
            buffer = watch(buffer, rendezvous, [rendezvous.address], ["here"])
        pool._pool[group], pool._capacity_source[group] = buffer, "host_cost.py"
        buffers[name] = buffer
    return buffers


def four_calls(buffer: Any, given: Tensors) -> Callable[[], None]:
    def layer() -> None:
        rows, _, row_probs, handle, _ = buffer.dispatch(
            given.x, topk_idx=given.picks, topk_weights=given.probs, num_experts=EXPERTS, do_expand=True
        )
        buffer.combine(rows, handle)
        rows, *_ = buffer.dispatch(given.x, handle=handle, do_expand=True, num_sms=14)
        buffer.combine(rows, handle, row_probs, num_sms=14)

    return layer


def fused_layer(group: Any, given: Tensors) -> Callable[[], None]:
    def layer() -> None:
        x, probs = given.leaves
        x.grad = probs.grad = None
        rows, _, row_probs, _, handle = fused_dispatch(
            x, given.picks, probs, EXPERTS, group, True, True, do_expand=True
        )
        y, _ = fused_combine(rows, group, handle, True, True)
        torch.autograd.backward([y, row_probs], given.gradients)

    return layer


def minimal_layer(given: Tensors) -> Callable[[], None]:
    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, probs: torch.Tensor) -> Any:
            return given.rows.detach(), given.row_probs.detach()

        @staticmethod
        def backward(ctx: Any, grad_rows: torch.Tensor, grad_probs: torch.Tensor) -> Any:
            return given.x.detach(), given.probs.detach()

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: torch.Tensor) -> Any:
            return given.x.detach()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return given.rows.detach()

    def layer() -> None:
        x, probs = given.leaves
        x.grad = probs.grad = None
        rows, row_probs = Dispatch.apply(x, probs)
        torch.autograd.backward([Combine.apply(rows), row_probs], given.gradients)

    return layer


def time_layers(variants: dict[str, Callable[[], None]], device: str, rounds: int) -> dict[str, list[float]]:
    """Microseconds of the host per layer, of each round. The variants take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-10, rounds):
        for name, layer in variants.items():
            start = time.perf_counter()
            for _ in range(LAYERS):
                layer()
            if number >= 0:
                times[name].append((time.perf_counter() - start) / LAYERS * 1e6)
            if device == "cuda":
                torch.cuda.synchronize()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("meta", "cuda"), default="meta")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--out", type=Path, help="write rows, below an environment header, to this JSONL file")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    settings.activate(settings.resolve(buffer="elastic", gin="off", dispatch_dtype="bf16", grad_dispatch_dtype="bf16"))

    given = Tensors(options.device)
    buffers = make_buffers(options.device, make_stub(given))
    variants = {name: four_calls(buffer, given) for name, buffer in buffers.items()}
    variants["minimal autograd"] = minimal_layer(given)
    for group, name in zip(pool._pool, ("elastic", "watched"), strict=True):
        variants[f"fused on {name}"] = fused_layer(group, given)
    times = time_layers(variants, options.device, options.rounds)
    pool.destroy_buffers()

    rows = []
    for name, values in times.items():
        fifths, floor = statistics.quantiles(values, n=5), times["minimal autograd" if "fused" in name else "stub"]
        ratio = statistics.median(one / other for one, other in zip(values, floor, strict=True))
        row = {"calls": name, "device": options.device, "rounds": options.rounds, "layers": LAYERS}
        row |= {"host_us": round(statistics.median(values), 2), "p20": round(fifths[0], 2), "p80": round(fifths[3], 2)}
        rows.append(row | {"ratio": round(ratio, 3), "over": "minimal autograd" if "fused" in name else "stub"})
        print(f"{name:<18}{row['host_us']:>9.1f} us a layer  {ratio:>6.2f} x {rows[-1]['over']}")
    write_rows(options.out, environment("python benchmarks/host_cost.py"), rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
