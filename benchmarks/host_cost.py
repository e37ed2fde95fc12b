"""What this package costs the host in one MoE layer, forward and backward: on any machine, with no deep_ep.

The four calls of a layer (dispatch, combine, cached dispatch, combine with weights) are made on a stand-in for the
buffer of deep_ep that answers at once, with tensors of the `meta` device, which have shapes and no data. What is left
is the time of Python and of autograd, which is what a GPU waits for where a layer starts on an idle one.

    stub                the four calls on the stand-in itself
    elastic, watched    on our ElasticBuffer around it; and with the watchdog's record
    minimal autograd    two autograd functions that do nothing, on the same tensors: the least that a layer with
                        gradients can cost
    fused on ...        fused_dispatch and fused_combine on these buffers, forward and backward
    ... layer           the manager's whole path on the watched buffer, forward and backward: selections, dispatch, our
                        grouped experts with `gradient_accumulation_fusion`, combine; expanded and sync-free

For the last two, the rows on `meta` also say what a layer has of autograd's nodes and of launches: kernels and copies
without those of deep_ep, the GEMMs and the watchdog. The GEMMs are a stand-in that allocates their results. On `meta` a
launch costs what our code for it does, or an operator's way through torch, without the driver's part. Both need Triton
and Megatron-Core.

With `--device cuda` the tensors are on a GPU, so that what the watchdog queues there counts, and so does autograd's way
to the device's thread and back; and each launch costs what it costs.

    python benchmarks/host_cost.py [--device cuda] [--out benchmarks/results/host_cost.jsonl]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import socket
import statistics
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ep_v2 import settings
from megatron_ep_v2.bench import timing
from megatron_ep_v2.bench.calls import RawCalls
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.buffers import elastic, pool
from megatron_ep_v2.buffers.contract import Buffer, BufferSpec, Payload
from megatron_ep_v2.experts import gemm
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch, set_deepep_num_sms
from megatron_ep_v2.kernels import select
from megatron_ep_v2.watchdog.rendezvous import Rendezvous
from megatron_ep_v2.watchdog.watched_buffer import watch

# Of one rank of eight with 128 experts, in a group of its own. Few tokens, so that a GPU waits for the host.
TOKENS, HIDDEN, FFN, TOPK, EXPERTS, ROWS = 512, 2048, 768, 8, 16, 4096
SPEC = BufferSpec(num_max_tokens_per_rank=TOKENS, hidden=HIDDEN, num_topk=TOPK, num_experts=EXPERTS)
LAYERS = 20  # timed together: short, so that on a busy machine most rounds are not interrupted


class Tensors:
    """What goes through a layer."""

    def __init__(self, device: str):
        self.x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
        self.topk_idx = torch.zeros(TOKENS, TOPK, dtype=torch.int64, device=device)
        self.dense_probs = torch.zeros(TOKENS, EXPERTS, device=device).requires_grad_()
        self.probs = torch.zeros(TOKENS, TOPK, device=device)
        self.rows = torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16, device=device)
        self.row_probs = torch.zeros(ROWS, device=device)
        self.row_topk_idx = torch.zeros(ROWS, TOPK, dtype=torch.int64, device=device)
        self.row_topk_probs = torch.zeros(ROWS, TOPK, device=device)
        self.counts = torch.zeros(EXPERTS, dtype=torch.int32, device=device)
        self.leaves = self.x.clone().requires_grad_(), self.probs.clone().requires_grad_()
        self.gradients = [self.x.clone(), self.row_probs.clone()]


class Handle(SimpleNamespace):
    """With what the callers read of deep_ep's."""


def make_stub(given: Tensors) -> type:
    """A class instead of deep_ep.ElasticBuffer. Its answers are new tensors each time, as the real ones are."""
    counts = [ROWS // EXPERTS] * EXPERTS

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
                num_recv_tokens_per_expert_list=counts if do_expand else [],
                do_expand=do_expand,
                expert_alignment=1,
                num_sms=14,
                topk_idx=given.topk_idx,
                num_experts=EXPERTS,
                num_recv_tokens=ROWS,
                num_expanded_tokens=ROWS,
                psum_num_recv_tokens_per_scaleup_rank=given.counts,
                psum_num_recv_tokens_per_expert=given.counts,
                num_unaligned_recv_tokens_per_expert=given.counts,
            )
            if do_expand:
                return given.rows.detach(), None, given.row_probs.detach(), handle, None
            idx, probs = given.row_topk_idx.detach(), given.row_topk_probs.detach()
            return given.rows.detach(), idx, probs, handle, None

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


class Launches(TorchDispatchMode):
    """Counts what torch's operators launch inside it, and our kernels."""

    # By name, without the namespace: views and allocations, which launch nothing.
    free = frozenset(
        (
            *("detach", "view", "slice", "select", "unsqueeze", "expand", "alias", "t", "transpose", "unbind"),
            *("split_with_sizes", "lift_fresh", "empty", "empty_like", "new_empty"),
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        on_host = all(each.is_cpu for each in (*args, result) if isinstance(each, torch.Tensor))
        self.number += not on_host and func._schema.name.removeprefix("aten::") not in self.free
        return result


def make_layers(group: ProcessGroup, given: Tensors) -> dict[str, Callable[[], torch.Tensor]]:
    """Forwards with the managers of both layouts; each returns the layer's output."""
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ep_v2.megatron.experts import GroupedExperts
    from megatron_ep_v2.megatron.managers import BY_LAYOUT

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=8,
        moe_ffn_hidden_size=FFN,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="deepep",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=True,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    # As `install()` does, which would ask for a deep_ep that is installed.
    for function in (fused_dispatch, fused_combine, set_deepep_num_sms):
        setattr(token_dispatcher, function.__name__, function)
    gemm._grouped_mm = lambda: _no_gemm
    with torch.device(given.x.device):
        experts = GroupedExperts(EXPERTS, config, None, SimpleNamespace(ep=group, expt_dp=group, expt_tp=group))
    for parameter in experts.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)

    def layer(layout: str) -> Callable[[], torch.Tensor]:
        manager = BY_LAYOUT[layout](group, EXPERTS, TOPK, EXPERTS, config)

        def forward() -> torch.Tensor:
            manager.setup_metadata(None, given.dense_probs)
            rows = manager.dispatch(given.leaves[0])
            rows, probs = manager.get_permuted_hidden_states_by_experts(rows)
            y, _ = experts(rows, manager.get_number_of_tokens_per_expert(), probs)
            combined: torch.Tensor = manager.combine(manager.get_restored_hidden_states_by_experts(y))
            return combined

        return forward

    leaves = [given.leaves[0], given.dense_probs, *experts.parameters()]

    def step(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            for leaf in leaves:
                leaf.grad = None
            y = forward()
            y.backward(given.gradients[0])
            return y

        return run

    return {f"{layout} layer": step(layer(layout)) for layout in ("expanded", "sync-free")}


def _no_gemm(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape[0], w.shape[-1], dtype=x.dtype, device=x.device)


_META: Any = torch.library.Library("aten", "IMPL")  # replacements last as long as it


def launch_into_nothing() -> None:
    """Make our kernels run for tensors of any device, without a driver; and torch's operators that launch one answer at
    once, which on `meta` find their shapes in Python, for hundreds of microseconds."""

    class Compiled:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            return _nothing

    compiled = Compiled()
    importlib.import_module("triton.runtime.jit").KernelInterface.__getitem__ = lambda self, grid: (
        lambda *arguments, **options: compiled
    )
    for name in ("layouts.places", "layouts.rows", "experts.mlp", "kernels.wgrad"):
        module = importlib.import_module(f"megatron_ep_v2.{name}")
        module.kernels_for = lambda tensor, definition, what: select._required(definition, what, "")

    def new(x: torch.Tensor, *_: object, dtype: torch.dtype | None = None, **__: object) -> torch.Tensor:
        return torch.empty(x.shape, dtype=dtype or x.dtype, device="meta")

    def top_k(x: torch.Tensor, k: int, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.empty(x.shape[0], k, dtype=kind, device="meta") for kind in (x.dtype, torch.int64))

    answers: dict[str, Callable[..., object]] = {
        **dict.fromkeys(("empty_like", "masked_fill.Scalar", "scatter.src", "cumsum", "sub.Tensor"), new),
        "eq.Scalar": lambda x, other: new(x, dtype=torch.bool),
        "maximum.out": lambda x, other, out: out,
        "add_.Tensor": lambda x, other, alpha=1: x,
        "topk": top_k,
    }
    for name, answer in answers.items():
        _META.impl(name, answer, "Meta", allow_override=True)


def _nothing(*arguments: object) -> None:
    pass


def count(step: Callable[[], torch.Tensor]) -> dict[str, int]:
    """Autograd's nodes without those of the leaves, and launches, of one layer."""
    step()  # what is allocated once does not count
    launched, original = 0, importlib.import_module("megatron_ep_v2.kernels.launch").launch
    users = [module for module in sys.modules.values() if vars(module).get("launch") is original]

    def counted(*arguments: Any, **options: Any) -> None:
        nonlocal launched
        launched += 1
        original(*arguments, **options)

    for module in users:
        module.launch = counted
    try:
        with Launches() as others:
            y = step()
    finally:
        for module in users:
            module.launch = original
    nodes, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes and "AccumulateGrad" not in node.name():
            nodes.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {"nodes": len(nodes), "launches": launched + others.number}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("meta", "cuda"), default="meta")
    parser.add_argument("--repeats", "--rounds", type=int, default=300, help="default 300")


def line(row: Row) -> str:
    counts = f", {row['nodes']} nodes, {row['launches']} launches" if "nodes" in row else ""
    return f"{row['calls']:<18}{row['host_us']:>9.1f} us a layer  {row['ratio']:>6.2f} x {row['over']}{counts}"


def measure(run: Run) -> Iterator[list[Row]]:
    settings.activate(settings.resolve(buffer="elastic", gin="off", dispatch_dtype="bf16", grad_dispatch_dtype="bf16"))
    device = run.options.device
    given = Tensors(device)
    buffers = make_buffers(device, make_stub(given))
    cases: dict[str, Callable[[], object]] = {name: four_calls(buffer, given) for name, buffer in buffers.items()}
    cases["minimal autograd"] = minimal_layer(given)
    for group, name in zip(pool._pool, ("elastic", "watched"), strict=True):
        cases[f"fused on {name}"] = fused_layer(group, given)
    gc.disable()  # a layer leaves no cycles, and a collection costs more than a layer
    counts: dict[str, dict[str, int]] = {}
    if all(importlib.util.find_spec(name) for name in ("triton", "megatron")):
        if device == "meta":
            launch_into_nothing()
        layers = make_layers(group, given)
        cases |= layers
        if device == "meta":  # on a GPU a backward has a thread of its own, in which nothing is counted
            counts = {name: count(layer) for name, layer in layers.items()}
    else:
        run.say("whole layers are left out: they need Triton and Megatron-Core")

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
        over = "minimal autograd" if "fused" in name or "layer" in name else "stub"
        of_case = timing.summarise(values)
        paired = statistics.median(one / other for one, other in zip(values, times[over], strict=True))
        row = {"calls": name, "device": device, "rounds": run.options.repeats, "layers": LAYERS}
        row |= {"host_us": round(of_case.median, 2), "p20": round(of_case.p20, 2), "p80": round(of_case.p80, 2)}
        yield [row | {"least": round(min(values), 2), "ratio": round(paired, 3), "over": over} | counts.get(name, {})]


if __name__ == "__main__":
    main(__doc__, measure, add_options, line=line, repeats=None, needs_gpu=False, single=True)
