"""What this package costs the host in one MoE layer, forward and backward: on any machine, with no deep_ep.

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
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

from megatron_ep_v2 import settings
from megatron_ep_v2.bench import timing
from megatron_ep_v2.bench.calls import RawCalls
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.buffers import elastic, pool
from megatron_ep_v2.buffers.contract import Buffer, BufferSpec, Payload
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
        self.topk_idx = torch.zeros(TOKENS, TOPK, dtype=torch.int64, device=device)
        self.probs = torch.zeros(TOKENS, TOPK, device=device)
        self.rows = torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16, device=device)
        self.row_probs = torch.zeros(ROWS, device=device)
        self.leaves = self.x.clone().requires_grad_(), self.probs.clone().requires_grad_()
        self.gradients = [self.x.clone(), self.row_probs.clone()]


class Handle(SimpleNamespace):
    """With what the callers read of deep_ep's."""


def make_stub(given: Tensors) -> type:
    """A class instead of deep_ep.ElasticBuffer. Its answers are new tensors each time, as the real ones are."""
    counts = [ROWS // LOCAL_EXPERTS] * LOCAL_EXPERTS

    class Stub:
        num_bytes, num_allocated_qps = 0, 0

        def __init__(self, group: ProcessGroup | None, **options: object):
            pass

        def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
            return 14

        def get_comm_stream(self) -> None:
            """None: its calls run on the current stream."""

        def dispatch(  # with deep_ep's parameters, since taking them costs something too
            self,
            x: Payload,
            topk_idx: torch.Tensor | None = None,
            topk_weights: torch.Tensor | None = None,
            num_experts: int | None = None,
            num_max_tokens_per_rank: int | None = None,
            expert_alignment: int | None = None,
            num_sms: int = 0,
            previous_event: None = None,
            async_with_compute_stream: bool = False,
            allocate_on_comm_stream: bool = False,
            handle: Handle | None = None,
            do_cpu_sync: bool | None = None,
            do_expand: bool = False,
            do_zero_padding: bool = False,
        ) -> tuple[torch.Tensor, None, torch.Tensor | None, Handle, None]:
            if handle is not None:
                return given.rows.detach(), None, None, handle, None
            handle = Handle(
                num_recv_tokens_per_expert_list=counts,
                do_expand=True,
                expert_alignment=1,
                num_sms=14,
                topk_idx=given.topk_idx,
                num_experts=EXPERTS,
                num_expanded_tokens=ROWS,
            )
            return given.rows.detach(), None, given.row_probs.detach(), handle, None

        def combine(
            self,
            x: torch.Tensor,
            handle: Handle,
            topk_weights: torch.Tensor | None = None,
            num_sms: int = 0,
            previous_event: None = None,
            async_with_compute_stream: bool = False,
            allocate_on_comm_stream: bool = False,
        ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
            return given.x.detach(), None if topk_weights is None else given.probs.detach(), None

        def destroy(self) -> None:
            pass

    return Stub


class AnyDeviceBuffer(elastic.ElasticBuffer):
    """Takes rows without data."""

    def _check_rows(self, rows: torch.Tensor, dtype: torch.dtype) -> None:
        assert rows.dtype == dtype and rows.is_meta and rows.shape[1] == self.spec.hidden


def make_buffers(device: str, stub: type) -> dict[str, Buffer]:
    """Each in a process group of its own, as the pool keeps them."""
    elastic.load_class = lambda name: stub
    kind = elastic.ElasticBuffer if device == "cuda" else AnyDeviceBuffer
    buffers: dict[str, Buffer] = {"stub": stub(None)}
    for name in ("elastic", "watched"):
        group = dist.new_group()
        buffer: Buffer = kind(group, SPEC, settings.active(), ["here"])
        if name == "watched":
            rendezvous = Rendezvous(group, settings.active().watchdog_secs)
            rendezvous.listener = socket.create_server(("localhost", 0))  # which a group of one rank has no need of
            rendezvous.address = (*rendezvous.listener.getsockname()[:2], "not asked for")
            buffer = watch(buffer, rendezvous, [rendezvous.address], ["here"])
        pool._pool[group], pool._capacity_source[group] = buffer, "host_cost.py"
        buffers[name] = buffer
    return buffers


def four_calls(buffer: Buffer, given: Tensors) -> Callable[[], object]:
    return RawCalls(
        buffer=buffer,
        hidden=given.x,
        grad_output=given.x,
        topk_idx=given.topk_idx,
        topk_weights=given.probs,
        num_experts=EXPERTS,
        do_expand=True,
    )


def fused_layer(group: ProcessGroup, given: Tensors) -> Callable[[], None]:
    def layer() -> None:
        x, probs = given.leaves
        x.grad = probs.grad = None
        rows, _, row_probs, _, handle = fused_dispatch(
            x, given.topk_idx, probs, EXPERTS, group, True, True, do_expand=True
        )
        y, _ = fused_combine(rows, group, handle, True, True)
        torch.autograd.backward([y, row_probs], given.gradients)

    return layer


def minimal_layer(given: Tensors) -> Callable[[], None]:
    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, x: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return given.rows.detach(), given.row_probs.detach()

        @staticmethod
        def backward(
            ctx: FunctionCtx, grad_rows: torch.Tensor, grad_probs: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return given.x.detach(), given.probs.detach()

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, rows: torch.Tensor) -> torch.Tensor:
            return given.x.detach()

        @staticmethod
        def backward(ctx: FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
            return given.rows.detach()

    def layer() -> None:
        x, probs = given.leaves
        x.grad = probs.grad = None
        rows, row_probs = Dispatch.apply(x, probs)
        torch.autograd.backward([Combine.apply(rows), row_probs], given.gradients)

    return layer


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("meta", "cuda"), default="meta")
    parser.add_argument("--repeats", "--rounds", type=int, default=300, help="default 300")


def line(row: Row) -> str:
    return f"{row['calls']:<18}{row['host_us']:>9.1f} us a layer  {row['ratio']:>6.2f} x {row['over']}"


def measure(run: Run) -> Iterator[list[Row]]:
    settings.activate(settings.resolve(buffer="elastic", gin="off", dispatch_dtype="bf16", grad_dispatch_dtype="bf16"))
    device = run.options.device
    given = Tensors(device)
    buffers = make_buffers(device, make_stub(given))
    cases: dict[str, Callable[[], object]] = {name: four_calls(buffer, given) for name, buffer in buffers.items()}
    cases["minimal autograd"] = minimal_layer(given)
    for group, name in zip(pool._pool, ("elastic", "watched"), strict=True):
        cases[f"fused on {name}"] = fused_layer(group, given)

    def take(name: str) -> dict[str, float]:
        """Of the host alone: its clock, until the last layer's calls have returned."""
        layers = [cases[name]] * LAYERS
        spent = timing.measure(lambda: [layer() for layer in layers], torch.device("cpu"), LAYERS)[0]
        if device == "cuda":
            torch.cuda.synchronize()
        return {"host": spent}

    times = {
        name: by_kind["host"]
        for name, by_kind in timing.alternate(cases, take, run.options.repeats, run.device, warmup=10).items()
    }
    for name, values in times.items():
        over, of_case = "minimal autograd" if "fused" in name else "stub", timing.summarise(values)
        paired = statistics.median(one / other for one, other in zip(values, times[over], strict=True))
        row = {"calls": name, "device": device, "rounds": run.options.repeats, "layers": LAYERS}
        row |= {"host_us": round(of_case.median, 2), "p20": round(of_case.p20, 2), "p80": round(of_case.p80, 2)}
        yield [row | {"ratio": round(paired, 3), "over": over}]


if __name__ == "__main__":
    main(__doc__, measure, add_options, line=line, repeats=None, needs_gpu=False, single=True)
