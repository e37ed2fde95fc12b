"""One MoE layer forward, each way from a dispatch to a grouped GEMM and back, for `gpu_layouts.py`.

expanded -> contiguous   the dispatch sorts the rows; the GEMM takes them where they are
compact -> contiguous    rows gathered into blocks by expert, added up after the experts
compact -> masked        rows gathered into `expected_m` rows for each expert, added up after them
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep_v2.bench.check import require_equal
from megatron_ep_v2.bench.shapes import Shape
from megatron_ep_v2.buffers.contract import Buffer, Handle
from megatron_ep_v2.experts.gemm import deep_gemm
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import swiglu_experts
from megatron_ep_v2.kernels import swiglu
from megatron_ep_v2.kernels.select import kernels_for
from megatron_ep_v2.layouts import (
    CONTIGUOUS_ALIGNMENT,
    check_overflow,
    gather_rows,
    gather_weights,
    place_contiguous,
    place_masked,
    reduce_rows,
)

CHECKED_TOKENS = 8  # compared with fp64 before anything is timed
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Model:
    """A layer's shape, and the weights of all experts: each rank makes the same ones, for the check."""

    shape: Shape
    w1: torch.Tensor  # [experts, 2 * ffn, hidden]
    w2: torch.Tensor  # [experts, hidden, ffn]

    @classmethod
    def make(cls, shape: Shape, device: torch.device) -> Model:
        hidden, ffn, experts = shape.hidden, shape.expert_ffn, shape.experts
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=generator, device=device, dtype=torch.bfloat16) * sizes[-1] ** -0.5

        return cls(shape, normal(experts, 2 * ffn, hidden), normal(experts, hidden, ffn))

    def own(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's experts."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        return self.w1.chunk(ranks)[rank], self.w2.chunk(ranks)[rank]


@dataclass(frozen=True)
class Batch:
    x: torch.Tensor
    topk_idx: torch.Tensor
    probs: torch.Tensor

    @classmethod
    def make(cls, model: Model, tokens: int, device: torch.device) -> Batch:
        generator = torch.Generator(device).manual_seed(1 + dist.get_rank())
        x = torch.randn(tokens, model.shape.hidden, generator=generator, device=device).bfloat16()
        top = torch.rand(tokens, model.shape.experts, generator=generator, device=device).topk(model.shape.topk, dim=1)
        return cls(x, top.indices, top.values.contiguous())


def variants(buffer: Buffer, model: Model, batch: Batch) -> dict[str, Run]:
    """By name; on DeepGEMM, too, where it is installed."""
    have_deep_gemm = batch.x.is_cuda and importlib.util.find_spec("deep_gemm") is not None
    ways: dict[str, Run] = {}
    for backend in ["grouped", *(["deepgemm"] if have_deep_gemm else [])]:
        ways[f"expanded -> contiguous, {backend}"] = expanded(buffer, model, batch, backend)
        ways[f"compact -> contiguous, {backend}"] = contiguous(buffer, model, batch, backend)
    ways["compact -> masked, bmm"] = masked(buffer, model, batch, _bmm)
    if have_deep_gemm:
        ways["compact -> masked, deepgemm"] = masked(buffer, model, batch, _masked_gemm)
    return ways


def expanded(buffer: Buffer, model: Model, batch: Batch, backend: str) -> Run:
    w1, w2 = model.own()

    def run() -> torch.Tensor:
        rows, _, row_probs, handle, _ = _dispatch(buffer, model, batch, do_expand=True, do_zero_padding=True)
        counts = torch.tensor(handle.num_recv_tokens_per_expert_list)
        y = swiglu_experts(rows, row_probs, w1, w2, Groups.from_counts(counts, rows), backend)
        return buffer.combine(y, handle, num_sms=handle.num_sms)[0]

    return run


def contiguous(buffer: Buffer, model: Model, batch: Batch, backend: str) -> Run:
    w1, w2 = model.own()

    def run() -> torch.Tensor:
        received, recv_idx, recv_probs, handle, _ = _dispatch(buffer, model, batch)
        num_rows = sum(handle.num_recv_tokens_per_expert_list)
        places = place_contiguous(recv_idx, None, len(w1), num_rows)
        rows, row_probs = gather_rows(received, places), gather_weights(recv_probs, places)
        y = swiglu_experts(rows, row_probs, w1, w2, Groups.from_places(places), backend)
        return buffer.combine(reduce_rows(y, places), handle, num_sms=handle.num_sms)[0]

    return run


def masked(buffer: Buffer, model: Model, batch: Batch, multiply: Callable[..., torch.Tensor]) -> Run:
    w1, w2 = model.own()
    expected_m = expected_rows(batch, model)

    def run() -> torch.Tensor:
        received, recv_idx, recv_probs, handle, _ = _dispatch(buffer, model, batch)
        places = place_masked(recv_idx, None, len(w1), expected_m)
        if first:
            check_overflow(places)
            first.clear()
        rows, row_probs = gather_rows(received, places), gather_weights(recv_probs, places)
        h = multiply(places.by_expert(rows), w1, places.counts)
        activated = kernels_for(h, swiglu, "experts").forward(h.flatten(0, 1), row_probs, None)
        y = multiply(places.by_expert(activated), w2, places.counts)
        return buffer.combine(reduce_rows(y, places), handle, num_sms=handle.num_sms)[0]

    first = [True]  # the overflow is looked at once, before anything is timed
    return run


def expected_rows(batch: Batch, model: Model) -> int:
    """Rows for each expert: twice an even share, in DeepGEMM's blocks."""
    share = len(batch.x) * dist.get_world_size() * model.shape.topk / model.shape.experts
    return math.ceil(2 * share / CONTIGUOUS_ALIGNMENT) * CONTIGUOUS_ALIGNMENT


def _dispatch(buffer: Buffer, model: Model, batch: Batch, **more: bool) -> tuple[Any, Any, Any, Handle, Any]:
    """Rows, ids and weights as the layout has them."""
    return buffer.dispatch(
        batch.x,
        topk_idx=batch.topk_idx,
        topk_weights=batch.probs,
        num_experts=model.shape.experts,
        expert_alignment=CONTIGUOUS_ALIGNMENT,
        **more,
    )


def _bmm(x: torch.Tensor, w: torch.Tensor, _counts: torch.Tensor) -> torch.Tensor:
    """[L, m, K] x [L, N, K] -> [L, m, N], padding and all."""
    return torch.bmm(x, w.transpose(1, 2))


def _masked_gemm(x: torch.Tensor, w: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(*x.shape[:2], w.shape[1])
    deep_gemm().m_grouped_bf16_gemm_nt_masked(x, w, out, counts, x.shape[1] // 2)
    return out


def check(runs: dict[str, Run], model: Model, batch: Batch) -> dict[str, float]:
    """Relative L2 of the first tokens' output against fp64."""
    tokens = min(CHECKED_TOKENS, len(batch.x))
    wanted = torch.zeros(tokens, model.shape.hidden, dtype=torch.float64, device=batch.x.device)
    for token in range(tokens):
        for expert, prob in zip(batch.topk_idx[token].tolist(), batch.probs[token].double(), strict=True):
            gate, up = (model.w1[expert].double() @ batch.x[token].double()).chunk(2)
            wanted[token] += model.w2[expert].double() @ (torch.nn.functional.silu(gate) * up * prob)
    return require_equal({name: run()[:tokens] for name, run in runs.items()}, wanted, 1.5e-2, batch.x.device)
