"""A MoE layer on `fused_dispatch` and `fused_combine`, as a rank runs it, against the oracle of `dense_moe`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from tests.helpers.cases import Case, Layout, make_batch, make_batches
from tests.helpers.compare import relative_errors
from tests.helpers.dense_oracle import Dense, Experts, dense_moe, make_experts

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative L2


@dataclass(frozen=True)
class Step:
    """What a training step left on one rank: gradients of x, of the probabilities and of the rank's own experts."""

    output: torch.Tensor
    grad_x: torch.Tensor
    grad_probs: torch.Tensor
    grad_experts: Experts

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"output": self.output, "gradient of x": self.grad_x, "gradient of the probabilities": self.grad_probs}
        names = ("gradient of gate", "gradient of up", "gradient of down")
        return named | dict(zip(names, self.grad_experts.tensors(), strict=True))


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """Probabilities are fp32; with an fp64 payload fp64, so that gradients can be checked numerically."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grad_output(case: Case, rank: int) -> torch.Tensor:
    """The gradient that reaches the output of the layer: [T, H]."""
    generator = torch.Generator().manual_seed(8000 + rank)
    return torch.randn(case.tokens[rank], case.hidden, generator=generator, dtype=torch.float64).to(case.dtype)


def all_experts(case: Case) -> Experts:
    """Of the whole group, in the case's dtype."""
    return Experts(*(tensor.to(case.dtype) for tensor in make_experts(case.experts, case.hidden, case.ffn).tensors()))


def own_experts(case: Case, rank: int, experts: Experts) -> Experts:
    """The part of one rank."""
    mine = slice(rank * case.local_experts, (rank + 1) * case.local_experts)
    return Experts(*(tensor[mine] for tensor in experts.tensors()))


def moe_layer(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    probs: torch.Tensor,
    experts: Experts,
    num_experts: int,
    group: Any,
    layout: Layout,
    **stream_arguments: bool,
) -> torch.Tensor:
    """Dispatch, run this rank's experts on their rows, weight, combine: [T, H] -> [T, H]."""
    recv_x, recv_idx, recv_probs, tokens_per_expert, handle = fused_dispatch(
        x, topk_idx, probs, num_experts, group, **layout.arguments(), **stream_arguments
    )
    if layout.do_expand:
        # Padding rows run through the experts too, as a grouped GEMM does it.
        rows_of_experts = recv_x.split(tokens_per_expert.tolist())
        rows = torch.cat([experts.run(expert, rows) for expert, rows in enumerate(rows_of_experts)])
        rows = (rows * recv_probs[:, None]).to(x.dtype)
    else:
        rows = torch.zeros_like(recv_x)
        for expert in range(len(tokens_per_expert)):
            row, k = (recv_idx == expert).nonzero(as_tuple=True)
            weighted = experts.run(expert, recv_x[row]) * recv_probs[row, k][:, None]
            rows = rows.index_add(0, row, weighted.to(x.dtype))
    return fused_combine(rows, group, handle, **stream_arguments)[0]


def step_of(
    layer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Experts], torch.Tensor],
    case: Case,
    rank: int,
    device: str = "cpu",
) -> Step:
    """Forward and backward of one batch through layer(x [T, H], topk_idx [T, K], probs [T, K], the rank's experts)."""
    batch = make_batch(case, rank, weights_dtype=weights_dtype(case.dtype))
    x, probs = (tensor.to(device).requires_grad_() for tensor in (batch.x, batch.topk_weights))
    own = own_experts(case, rank, all_experts(case))
    experts = Experts(*(tensor.to(device, copy=True).requires_grad_() for tensor in own.tensors()))
    output = layer(x, batch.topk_idx.to(device), probs, experts)
    output.backward(grad_output(case, rank).to(device))
    grads = (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in experts.tensors())
    return Step(output.detach(), x.grad, probs.grad, Experts(*grads))


def train_step(case: Case, layout: Layout, group: Any, **stream_arguments: bool) -> Step:
    """`step_of` of `moe_layer`."""

    def layer(x: torch.Tensor, topk_idx: torch.Tensor, probs: torch.Tensor, experts: Experts) -> torch.Tensor:
        return moe_layer(x, topk_idx, probs, experts, case.experts, group, layout, **stream_arguments)

    return step_of(layer, case, group.rank())


def layer_of(group: Any, case: Case, layout: Layout) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(fn, x, probs): fn(x, probs) is the layer on this rank's part of a batch."""
    batch = make_batch(case, group.rank(), weights_dtype=torch.float64)
    experts = own_experts(case, group.rank(), all_experts(case))

    def layer(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        return moe_layer(x, batch.topk_idx, probs, experts, case.experts, group, layout)

    return layer, batch.x.requires_grad_(), batch.topk_weights.requires_grad_()


@functools.lru_cache(maxsize=64)
def dense(case: Case) -> Dense:
    """What the layer must give, from one process that holds all tokens and all experts."""
    batches = make_batches(case, weights_dtype=weights_dtype(case.dtype))
    return dense_moe(
        [batch.x for batch in batches],
        [batch.topk_idx for batch in batches],
        [batch.topk_weights for batch in batches],
        all_experts(case),
        [grad_output(case, rank) for rank in range(case.size)],
    )


def of_rank(whole: Dense, case: Case, rank: int) -> Step:
    """What a dense layer says of one rank."""
    own = own_experts(case, rank, whole.grad_experts)
    return Step(whole.output[rank], whole.grad_x[rank], whole.grad_probs[rank], own)


def step_errors(case: Case, rank: int, step: Step) -> dict[str, float]:
    """Relative L2 error of the output and of each gradient."""
    return relative_errors(step.tensors(), of_rank(dense(case), case, rank).tensors())


def assert_step(case: Case, rank: int, step: Step) -> None:
    for name, error in step_errors(case, rank, step).items():
        assert error <= TOLERANCE[case.dtype], f"{name}: relative L2 error {error:.3g}"
