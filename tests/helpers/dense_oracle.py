"""A MoE layer in fp64 in one process that holds all tokens and all experts, and its gradients by autograd: what every
layer in a group must agree with. Nothing here is shared with the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Experts:
    """SwiGLU experts: gate and up [E, H, F], down [E, F, H]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def of_stacked(cls, w1: torch.Tensor, w2: torch.Tensor) -> Experts:
        """From w1 [E, 2F, H], gate and up, and w2 [E, H, F], as the package and Megatron stack them."""
        gate, up = w1.mT.chunk(2, dim=2)
        return cls(gate, up, w2.mT)

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w1 and w2, contiguous."""
        return torch.cat([self.gate.mT, self.up.mT], dim=1), self.down.mT.contiguous()

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.gate, self.up, self.down

    def run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert on rows [N, H]."""
        return (torch.nn.functional.silu(x @ self.gate[expert]) * (x @ self.up[expert])) @ self.down[expert]


def make_experts(num_experts: int, hidden: int, ffn: int, seed: int = 7) -> Experts:
    """Random experts in fp64, scaled so that outputs are of the size of the inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(num_experts, rows, columns, generator=generator, dtype=torch.float64) / rows**0.5

    return Experts(normal(hidden, ffn), normal(hidden, ffn), normal(ffn, hidden))


@dataclass(frozen=True)
class Dense:
    """Output [T, H] and gradients of the layer: one entry per rank, `experts` for all of them."""

    output: list[torch.Tensor]
    grad_x: list[torch.Tensor]
    grad_probs: list[torch.Tensor]
    grad_experts: Experts


def dense_moe(
    x: list[torch.Tensor],
    topk_idx: list[torch.Tensor],
    probs: list[torch.Tensor],
    experts: Experts,
    grad_output: list[torch.Tensor],
) -> Dense:
    """out[t] = sum over k of probs[t, k] * expert[topk_idx[t, k]](x[t]); gradients of sum(out * grad_output).

    Each list has one entry per rank: x [T, H], topk_idx [T, K], -1 = dropped, probs [T, K], grad_output [T, H].
    """
    x = [rows.detach().double().clone().requires_grad_() for rows in x]
    probs = [weights.detach().double().clone().requires_grad_() for weights in probs]
    experts = Experts(*(tensor.detach().double().clone().requires_grad_() for tensor in experts.tensors()))

    output = []
    for rows, selected, weights in zip(x, topk_idx, probs, strict=True):
        out = torch.zeros_like(rows)
        for expert in range(len(experts.gate)):
            token, k = (selected == expert).nonzero(as_tuple=True)
            out = out.index_add(0, token, experts.run(expert, rows[token]) * weights[token, k][:, None])
        output.append(out)

    leaves = [*x, *probs, *experts.tensors()]
    grads = torch.autograd.grad(output, leaves, [grad.double() for grad in grad_output])
    ranks = len(x)
    return Dense(
        output=[out.detach() for out in output],
        grad_x=list(grads[:ranks]),
        grad_probs=list(grads[ranks : 2 * ranks]),
        grad_experts=Experts(*grads[2 * ranks :]),
    )
