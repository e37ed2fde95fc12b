"""Megatron's MoE layer with redundant experts on given routings, its dense oracle, and what a step moves; on the
reference buffer and on GPUs alike."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.helpers.balance_cases import selections
from tests.helpers.carriers import buffer_class
from tests.helpers.compare import relative_errors
from tests.helpers.dense_oracle import Dense, Experts, dense_moe
from tests.helpers.megatron_layer import hidden_states, moe_layer_of, process_groups, set_weights, transformer_config
from tests.helpers.shapes import Shape

# min_rows 1 and from 100 %: whatever can be planned is.
PLANS = {"balance_min_rows": 1, "balance_from_percent": 100, "num_max_tokens_per_rank": 64}


class GivenRouter(torch.nn.Module):
    """Routes every token to given experts.

    Attributes:
        probs: [T, E], 0 where an expert is not selected; its gradient is the router's.
        columns: [T, E], in which order the second call returns the probabilities; None = unchanged.
    """

    columns: torch.Tensor | None = None
    calls = 0

    def __init__(self, topk_idx: torch.Tensor, experts: int, dtype: torch.dtype, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        dense = torch.zeros(len(topk_idx), experts + 1, dtype=dtype)
        values = 0.1 + torch.rand(topk_idx.shape, generator=generator, dtype=torch.float64)
        dense.scatter_(1, topk_idx.where(topk_idx >= 0, experts), values.to(dtype))
        self.probs = torch.nn.Parameter(dense[:, :experts].contiguous())

    def forward(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        probs = self.probs * 1.0
        if self.columns is not None:  # a checkpoint wants both runs to save the same tensors
            as_they_are = torch.arange(probs.shape[1]).expand_as(probs)
            probs = probs.gather(1, self.columns if self.calls == 2 else as_they_are)
        return probs, probs.detach() > 0


@dataclass
class Watched:
    """What the experts of this rank were given, and the transfers of redundant experts.

    Attributes:
        rows, counts: For each forward of the experts.
        calls: Names of the transfers, in order.
        mappings: Of the transfers of weights.
    """

    rows: list[torch.Tensor] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    mappings: list[list[list[int]]] = field(default_factory=list)


@contextlib.contextmanager
def watched(carrier: str = "reference", poisoned: bool = False) -> Iterator[Watched]:
    """Note what happens on a carrier's buffers. poisoned: All slots are NaN when a prefetch begins."""
    from megatron_ep_v2.megatron.experts import Experts as OurExperts

    found, forward, buffers = Watched(), OurExperts.forward, buffer_class(carrier)

    def noting_rows(self: Any, rows: torch.Tensor, counts: torch.Tensor, probs: torch.Tensor) -> Any:
        found.rows.append(rows.detach().clone())
        found.counts.append(counts.tolist())
        return forward(self, rows, counts, probs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(OurExperts, "forward", noting_rows))
        for name in ("prefetch_weights", "reduce_grads"):
            theirs = getattr(buffers, name)

            def noting(self: Any, *arguments: Any, theirs: Any = theirs, name: str = name) -> Any:
                found.calls.append(name)
                if name == "prefetch_weights":
                    slots, _, mapping = arguments
                    found.mappings.append(mapping.tolist())
                    for slot in (*slots.weights, *slots.grads) if poisoned else ():
                        slot.fill_(float("nan"))
                return theirs(self, *arguments)

            stack.enter_context(mock.patch.object(buffers, name, noting))
        yield found


def routing(kind: str, shape: Shape, rank: int, tokens: int) -> torch.Tensor:
    """[T, K] of `balance_cases`."""
    generator = torch.Generator().manual_seed(50 + rank)
    return selections(kind, tokens, shape.topk, shape.experts, generator)


def build(shape: Shape, backend: str, topk_idx: torch.Tensor, slots: int, **more: Any) -> Any:
    """Install, and build a layer on it, with the same weights every time."""
    install(backend, slots)
    return add_layer(shape, backend, topk_idx, **more)


def install(backend: str, slots: int, **settings: Any) -> None:
    import megatron_ep_v2

    megatron_ep_v2.uninstall()
    megatron_ep_v2.install(**PLANS | {"buffer": "reference", "experts": backend, "redundant_experts": slots} | settings)


def add_layer(shape: Shape, backend: str, topk_idx: torch.Tensor, std: float = 0.2, **more: Any) -> Any:
    """A layer on what is installed. std: Of its weights, which are otherwise the same every time."""
    from megatron_ep_v2.megatron.experts import EXPERTS

    layer = moe_layer_of(transformer_config(shape, **more), experts=EXPERTS[backend])
    set_weights(layer, std)
    set_routing(layer, shape, topk_idx)
    return layer


def set_routing(layer: Any, shape: Shape, topk_idx: torch.Tensor) -> None:
    """From now on. topk_idx: [T, K] on the CPU. Probabilities are in fp32 or better, as of Megatron's router."""
    dtype = torch.promote_types(shape.dtype, torch.float32)
    layer.router = GivenRouter(topk_idx, shape.experts, dtype, seed=90 + dist.get_rank()).to(shape.device)


def inputs(shape: Shape, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, 1, H] and the gradient of the output."""
    x = hidden_states(shape, tokens, 1, seed=seed)
    return x, hidden_states(shape, tokens, 1, seed=seed + 7)


def step(layer: Any, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and every gradient, the router's too."""
    x = x.detach().requires_grad_()
    y = layer(x)[0]
    y.backward(grad)
    return {"output": y.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}


def dense(shape: Shape, kinds: list[torch.Tensor], parts: list[Any]) -> Dense:
    """The oracle. parts: Of each rank (x, gradient, dense probabilities [T, E], w1, w2)."""
    xs, grads, probs, w1, w2 = zip(*parts, strict=True)
    picked = [p.double().gather(1, idx.clamp(min=0)) * (idx >= 0) for p, idx in zip(probs, kinds, strict=True)]
    experts = Experts.of_stacked(torch.cat(w1).double(), torch.cat(w2).double())
    flat = [x.flatten(0, 1).double() for x in xs]
    return dense_moe(flat, kinds, picked, experts, [g.flatten(0, 1).double() for g in grads])


# -------------------------------------------------------------------------------------- steps in a row, each planned

# Two micro-batches each, both forward before the first backward, which is the second one's.
STEPS = (("zipf", "zipf, of other experts"), ("one-hot", "equal"), ("empty rank", "zipf, of other experts"))
WITHOUT_PLAN = "equal"
KEPT = ("autograd", "main_grad", "fused")  # where weights' gradients are added
BF16 = Shape(torch.bfloat16, topk=4, hidden=512, ffn=256, tokens=128)
BOUND = 1.2e-2  # bf16 rounds h, a, y and partial sums


def against_dense(group: Any, shape: Shape, slots: int) -> dict[Any, Any]:
    """Steps in a row on one buffer, with slots that are NaN when a prefetch begins.

    Returns:
        (where gradients are kept, number of the step) -> "errors": relative L2 of outputs and of every gradient to
        the dense layer; "calls" and "mappings" as in `Watched`.
    """
    found: dict[Any, Any] = {}
    with process_groups(), watched(shape.buffer, poisoned=True) as seen:
        install("grouped", slots, buffer=shape.buffer, num_max_tokens_per_rank=shape.tokens)
        for kept in KEPT:
            plain = {"moe_grouped_gemm": False, "moe_permute_fusion": False}  # which would need TransformerEngine
            layer = add_layer(shape, "grouped", torch.zeros(0, shape.topk, dtype=torch.int64), 0.05, **plain)
            into = collected(layer, fused=kept == "fused") if kept != "autograd" else []
            for number, kinds in enumerate(STEPS):
                calls, mappings = len(seen.calls), len(seen.mappings)
                for main_grad in into:
                    main_grad.zero_()
                errors = in_two_micro_batches(group, layer, shape, kinds, into)
                found[kept, number] = {
                    "errors": errors,
                    "calls": seen.calls[calls:],
                    "mappings": seen.mappings[mappings:],
                }
    return found


def collected(layer: Any, fused: bool) -> list[torch.Tensor]:
    """Let the gradients of both linears be added to a `main_grad`, as in DDP: by their GEMM, or by autograd's hook."""
    from megatron_ep_v2.megatron.qwen3_moe.optimizer import collect_gradient

    found = []
    for linear in (layer.experts.linear_fc1, layer.experts.linear_fc2):
        linear.fuse_wgrad_accumulation = fused
        found.append(torch.empty(linear.weight.shape, dtype=torch.float32, device=linear.weight.device))
        collect_gradient(linear.weight, found[-1])
    return found


def step_routing(kind: str, shape: Shape, rank: int) -> torch.Tensor:
    """[T, K] of a kind of `STEPS`; ranks have different numbers of tokens."""
    if kind == "empty rank" and rank == 1:
        return torch.empty(0, shape.topk, dtype=torch.int64)
    tokens = shape.tokens if kind == "equal" else shape.tokens - 3 * rank
    topk_idx = routing("zipf" if kind.startswith(("zipf", "empty")) else kind, shape, rank, tokens)
    return shape.experts - 1 - topk_idx if kind == "zipf, of other experts" else topk_idx


def in_two_micro_batches(
    group: Any, layer: Any, shape: Shape, kinds: tuple[str, str], main_grads: list[torch.Tensor]
) -> dict[str, float]:
    """Relative L2 errors of a step to the dense layer. main_grads: Of both linears, or none."""
    rank = group.rank()
    layer.zero_grad(set_to_none=True)
    runs, ours, wanted = [], {}, {}
    for number, kind in enumerate(kinds):
        topk_idx = step_routing(kind, shape, rank)
        set_routing(layer, shape, topk_idx)
        x, grad = inputs(shape, len(topk_idx), seed=number)
        x.requires_grad_()
        runs.append((topk_idx, x, grad, layer.router.probs, layer(x)[0]))
    for *_, grad, _, y in reversed(runs):
        y.backward(grad)
    weights = layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight
    local = slice(rank * len(weights[0]), (rank + 1) * len(weights[0]))
    w1, w2 = (torch.zeros(weight.shape, dtype=torch.float64) for weight in weights)
    for number, (topk_idx, x, grad, probs, y) in enumerate(runs):
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, (topk_idx, [t.detach().cpu() for t in (x, grad, probs, *weights)]))
        layers = dense(shape, [idx for idx, _ in everyone], [parts for _, parts in everyone])
        for total, stacked in zip((w1, w2), layers.grad_experts.stacked(), strict=True):
            total += stacked[local]
        in_columns = layers.grad_probs[rank].masked_fill(topk_idx < 0, 0.0)
        ours |= {f"output {number}": y, f"x {number}": x.grad, f"probs {number}": probs.grad}
        wanted |= {
            f"output {number}": layers.output[rank].view(x.shape),
            f"x {number}": layers.grad_x[rank].view(x.shape),
            f"probs {number}": torch.zeros(probs.shape, dtype=torch.float64).scatter_add(
                1, topk_idx.clamp(min=0), in_columns
            ),
        }
    grads = main_grads or [weight.grad for weight in weights]
    ours, wanted = ours | dict(zip(("w1", "w2"), grads, strict=True)), wanted | {"w1": w1, "w2": w2}
    return relative_errors({name: tensor.detach().cpu() for name, tensor in ours.items()}, wanted)


def check_steps(by_rank: list[dict[Any, Any]]) -> float:
    """Assert what `against_dense` found on all ranks; returns the largest error."""
    worst = 0.0
    for rank, found in enumerate(by_rank):
        assert found.keys() == {(kept, number) for kept in KEPT for number in range(len(STEPS))}
        for (kept, number), of in found.items():
            what = f"rank {rank}, {kept}, step {number} {STEPS[number]}"
            for name, error in of["errors"].items():
                assert error < BOUND, f"{what}, {name}: relative L2 {error:.1e}"  # not so for NaN
                worst = max(worst, error)
            forward, home = ["prefetch_weights"], ["reduce_grads"] * 2
            # The slots still hold the plan of the last forward, and are filled again for the one before.
            both = forward + forward + home + forward + home
            assert of["calls"] == (forward + home if WITHOUT_PLAN in STEPS[number] else both), what
            assert of["mappings"] == by_rank[0]["autograd", number]["mappings"], what
            for plan in of["mappings"]:
                assert any(expert < 0 for experts in plan for expert in experts), "a slot that the plan does not use"
            assert all(one != other for one, other in itertools.pairwise(of["mappings"])), what
    return worst
