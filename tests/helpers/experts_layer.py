"""A MoE layer of this package's own parts, each way between dispatch and grouped GEMM, on any device; and its judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import swiglu_experts
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.layouts import (
    check_overflow,
    gather_rows,
    gather_weights,
    place_contiguous,
    place_masked,
    reduce_rows,
)
from tests.helpers.experts_oracle import Layer, layer

WAYS = ("expanded", "contiguous", "masked")
ALIGNMENT = 128


def through(way: str, group: Any, backend: str, x: Any, picks: Any, probs: Any, w1: Any, w2: Any) -> torch.Tensor:
    """expanded: rows stay where the dispatch put them; contiguous, masked: compact rows, laid out and added up."""
    local, experts = len(w1), len(w1) * group.size()
    given = (x, picks, probs, experts, group)
    if way == "expanded":
        rows, _, row_probs, counts, handle = fused_dispatch(*given, do_expand=True, expert_alignment=ALIGNMENT)
        y = swiglu_experts(rows, row_probs, w1, w2, Groups.from_counts(counts, rows), backend)
        return fused_combine(y, group, handle)[0]
    received, recv_idx, recv_probs, counts, handle = fused_dispatch(*given, expert_alignment=ALIGNMENT)
    assert recv_idx is not None
    if way == "contiguous":
        places = place_contiguous(recv_idx, None, local, int(counts.sum()), ALIGNMENT)
    else:
        places = place_masked(recv_idx, None, local, max(ALIGNMENT, int(counts.max())))
    check_overflow(places)
    rows, row_probs = gather_rows(received, places), gather_weights(recv_probs, places)
    y = swiglu_experts(rows, row_probs, w1, w2, Groups.from_places(places), backend)
    return fused_combine(reduce_rows(y, places), group, handle)[0]


def run_layer(
    group: Any, ways: Sequence[str], backends: Sequence[str], sizes: dict[str, Any], device: str
) -> dict[str, dict[str, torch.Tensor]]:
    """Output and gradients of this rank, on the CPU; weights' gradients of its own experts."""
    given: Layer = layer(ranks=group.size(), device=device, **sizes)
    rank, local = group.rank(), len(given.w1) // group.size()
    own = slice(rank * local, (rank + 1) * local)
    results = {}
    for way in ways:
        for backend in backends:
            x, probs = given.x[rank].clone().requires_grad_(), given.probs[rank].clone().requires_grad_()
            w1, w2 = given.w1[own].clone().requires_grad_(), given.w2[own].clone().requires_grad_()
            out = through(way, group, backend, x, given.picks[rank], probs, w1, w2)
            out.backward(given.grad[rank])
            found = {"output": out.detach(), "x": x.grad, "probs": probs.grad, "w1": w1.grad, "w2": w2.grad}
            results[f"{way}, {backend}"] = {name: tensor.cpu() for name, tensor in found.items()}
    return results


def errors(
    answers: list[dict[str, dict[str, torch.Tensor]]], wanted: list[dict[str, torch.Tensor]]
) -> dict[str, float]:
    """ "rank, way, backend, tensor" -> relative L2."""
    found = {}
    for rank, by_run in enumerate(answers):
        for run, tensors in by_run.items():
            for name, tensor in tensors.items():
                target = wanted[rank][name].cpu()
                if name in ("w1", "w2"):
                    target = target.chunk(len(answers))[rank]
                assert tensor.shape == target.shape
                error = (tensor.double() - target).norm() / target.norm()
                found[f"rank {rank}, {run}, {name}"] = error.item()
    return found
