"""A MoE layer of SwiGLU experts on torch's grouped GEMM, in the expanded layout with its host wait and without any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import swiglu_experts
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.sync_free import sync_free_combine, sync_free_dispatch


@dataclass(frozen=True)
class Sizes:
    """Of the layer, on one rank: Qwen3-30B-A3B's shape unless said otherwise."""

    tokens: int = 4096
    hidden: int = 2048
    ffn: int = 768
    experts: int = 128
    topk: int = 8


class ExpertLayer:
    """The layer and what goes in: leaves that stay where they are, so that a graph can be captured over them."""

    def __init__(self, sizes: Sizes, group: ProcessGroup, device: torch.device):
        self.sizes, self.group, self.device = sizes, group, device
        generator = torch.Generator(device).manual_seed(1000 + group.rank())

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * scale).bfloat16()

        local = sizes.experts // group.size()
        self.w1 = normal(local, 2 * sizes.ffn, sizes.hidden, scale=sizes.hidden**-0.5).requires_grad_()
        self.w2 = normal(local, sizes.hidden, sizes.ffn, scale=sizes.ffn**-0.5).requires_grad_()
        self.x = torch.empty(sizes.tokens, sizes.hidden, dtype=torch.bfloat16, device=device).requires_grad_()
        self.topk_idx = torch.empty(sizes.tokens, sizes.topk, dtype=torch.int64, device=device)
        self.probs = torch.empty(sizes.tokens, sizes.topk, device=device).requires_grad_()
        self.grad = torch.empty_like(self.x, requires_grad=False)
        self.fill(0)

    @torch.no_grad()
    def fill(self, seed: int, skew: float = 0.0) -> None:
        """New tokens. skew: how much the selections prefer the last rank's experts."""
        sizes = self.sizes
        generator = torch.Generator(self.device).manual_seed(64 * seed + self.group.rank())
        scores = torch.rand(sizes.tokens, sizes.experts, generator=generator, device=self.device)
        scores[:, -(sizes.experts // self.group.size()) :] += skew
        top = scores.topk(sizes.topk, dim=1)
        self.topk_idx.copy_(top.indices)
        self.topk_idx[sizes.tokens // 2 :: 7, 0] = -1  # dropped
        self.probs.copy_(torch.softmax(top.values, dim=1))
        for tensor in (self.x, self.grad):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device=self.device))

    def expanded(self) -> torch.Tensor:
        """Forward with the host wait: [T, H]."""
        rows, _, probs, counts, handle = fused_dispatch(
            self.x, self.topk_idx, self.probs, self.sizes.experts, self.group, do_expand=True
        )
        assert counts is not None
        y = swiglu_experts(rows, probs, self.w1, self.w2, Groups.from_counts(counts, rows), "grouped")
        return fused_combine(y, self.group, handle)[0]

    def sync_free(self) -> torch.Tensor:
        """Forward without one: [T, H]."""
        rows, probs, _, handle = sync_free_dispatch(self.x, self.topk_idx, self.probs, self.sizes.experts, self.group)
        groups = Groups.from_places(handle.places)
        y = swiglu_experts(rows, probs, self.w1, self.w2, groups, "grouped")
        return sync_free_combine(y, self.group, handle)

    def step(self, forward: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Forward and backward: the output and all gradients."""
        leaves = {"x": self.x, "probs": self.probs, "w1": self.w1, "w2": self.w2}
        y = forward()
        gradients = torch.autograd.grad(y, list(leaves.values()), self.grad)
        return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    def capture(self) -> tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor]]:
        """The sync-free step as a CUDA graph, and where each replay leaves its results."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step(self.sync_free)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self.step(self.sync_free)
        return graph, results
