"""Megatron's MoE layer with redundant experts on given routings, its dense oracle, and what a step moves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.helpers.balance_cases import selections
from tests.helpers.dense_oracle import Dense, Experts, dense_moe
from tests.helpers.megatron_layer import hidden_states, moe_layer_of, set_weights, transformer_config
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
        if self.columns is not None and self.calls == 2:
            probs = probs.gather(1, self.columns)
        return probs, probs.detach() > 0


@dataclass
class Watched:
    """What the experts of this rank were given, and the transfers of redundant experts.

    Attributes:
        rows, counts: For each forward of the experts.
        calls: Names of the transfers, in order.
    """

    rows: list[torch.Tensor] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    from megatron_ep_v2.buffers.reference import ReferenceBuffer
    from megatron_ep_v2.megatron.experts import Experts as OurExperts

    found, forward = Watched(), OurExperts.forward

    def noting_rows(self: Any, rows: torch.Tensor, counts: torch.Tensor, probs: torch.Tensor) -> Any:
        found.rows.append(rows.detach().clone())
        found.counts.append(counts.tolist())
        return forward(self, rows, counts, probs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(OurExperts, "forward", noting_rows))
        for name in ("prefetch_weights", "reduce_grads"):
            theirs = getattr(ReferenceBuffer, name)

            def noting(self: Any, *arguments: Any, theirs: Any = theirs, name: str = name) -> Any:
                found.calls.append(name)
                return theirs(self, *arguments)

            stack.enter_context(mock.patch.object(ReferenceBuffer, name, noting))
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
    megatron_ep_v2.install(buffer="reference", experts=backend, redundant_experts=slots, **PLANS, **settings)


def add_layer(shape: Shape, backend: str, topk_idx: torch.Tensor, std: float = 0.2, **more: Any) -> Any:
    """A layer on what is installed. std: Of its weights, which are otherwise the same every time."""
    from megatron_ep_v2.megatron.experts import EXPERTS

    layer = moe_layer_of(transformer_config(shape, **more), experts=EXPERTS[backend])
    set_weights(layer, std)
    layer.router = GivenRouter(topk_idx, shape.experts, shape.dtype, seed=90 + dist.get_rank())
    return layer


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
