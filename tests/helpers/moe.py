"""A MoE layer on `fused_dispatch` and `fused_combine`, as a rank runs it: the counterpart of `oracle.dense_moe`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers.pool import destroy_buffers
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from tests.helpers.cases import Case, make_batch, make_batches
from tests.helpers.oracle import Dense, Experts, dense_moe, make_experts

FFN = 8
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative L2


@dataclass(frozen=True)
class Step:
    """What a training step left on one rank: gradients of x, of the probabilities and of the rank's own experts."""

    output: torch.Tensor
    grad_x: torch.Tensor
    grad_probs: torch.Tensor
    grad_experts: Experts


@dataclass(frozen=True)
class Layout:
    """As `fused_dispatch` takes it."""

    do_expand: bool
    alignment: int = 1

    def __str__(self) -> str:
        return f"{'expanded' if self.do_expand else 'compact'}-{self.alignment}"

    def arguments(self) -> dict[str, Any]:
        return {"do_expand": self.do_expand, "expert_alignment": self.alignment}


COMPACT, EXPANDED, PADDED = Layout(False), Layout(True), Layout(True, 16)


def own_package(fn: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that ranks run: no settings or buffers of an earlier run, and none for a later one."""

    @functools.wraps(fn)
    def wrapper(group: Any, *args: Any) -> Any:
        settings.activate(None)
        try:
            return fn(group, *args)
        finally:
            destroy_buffers()
            settings.activate(None)

    return wrapper


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """Probabilities are fp32; with an fp64 payload fp64, so that gradients can be checked numerically."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grad_output(case: Case, rank: int) -> torch.Tensor:
    """The gradient that reaches the output of the layer: [T, H]."""
    generator = torch.Generator().manual_seed(8000 + rank)
    return torch.randn(case.tokens[rank], case.hidden, generator=generator, dtype=torch.float64).to(case.dtype)


def all_experts(case: Case) -> Experts:
    """Of the whole group, in the case's dtype."""
    return Experts(*(tensor.to(case.dtype) for tensor in make_experts(case.experts, case.hidden, FFN).tensors()))


def own_experts(case: Case, rank: int, experts: Experts) -> Experts:
    """The part of one rank."""
    mine = slice(rank * case.local_experts, (rank + 1) * case.local_experts)
    return Experts(*(tensor[mine] for tensor in experts.tensors()))


def moe_layer(
    x: torch.Tensor,
    picks: torch.Tensor,
    probs: torch.Tensor,
    experts: Experts,
    num_experts: int,
    group: Any,
    layout: Layout,
    **stream_arguments: bool,
) -> torch.Tensor:
    """Dispatch, run this rank's experts on their rows, weight, combine: [T, H] -> [T, H]."""
    recv_x, recv_idx, recv_probs, tokens_per_expert, handle = fused_dispatch(
        x, picks, probs, num_experts, group, **layout.arguments(), **stream_arguments
    )
    if layout.do_expand:
        # Padding rows run through the experts too, as a grouped GEMM does it.
        rows_of_experts = recv_x.split(tokens_per_expert.tolist())
        rows = torch.cat([experts.run(expert, rows) for expert, rows in enumerate(rows_of_experts)])
        rows = (rows * recv_probs[:, None]).to(x.dtype)
    else:
        rows = torch.zeros_like(recv_x)
        for expert in range(len(tokens_per_expert)):
            row, pick = (recv_idx == expert).nonzero(as_tuple=True)
            weighted = experts.run(expert, recv_x[row]) * recv_probs[row, pick][:, None]
            rows = rows.index_add(0, row, weighted.to(x.dtype))
    return fused_combine(rows, group, handle, **stream_arguments)[0]


def train_step(case: Case, layout: Layout, group: Any, **stream_arguments: bool) -> Step:
    """Forward and backward of one batch."""
    rank = group.rank()
    batch = make_batch(case, rank, weights_dtype=weights_dtype(case.dtype))
    x, probs = batch.x.requires_grad_(), batch.topk_weights.requires_grad_()
    experts = own_experts(case, rank, all_experts(case))
    experts = Experts(*(tensor.clone().requires_grad_() for tensor in experts.tensors()))
    output = moe_layer(x, batch.topk_idx, probs, experts, case.experts, group, layout, **stream_arguments)
    output.backward(grad_output(case, rank))
    return Step(output.detach(), x.grad, probs.grad, Experts(*(tensor.grad for tensor in experts.tensors())))


@own_package
def train_steps(group: Any, case: Case, layouts: list[Layout]) -> dict[Layout, Step]:
    """Runs in every rank."""
    return {layout: train_step(case, layout, group) for layout in layouts}


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


def assert_step(case: Case, rank: int, step: Step) -> None:
    expected = dense(case)
    close = functools.partial(assert_close, tolerance=TOLERANCE[case.dtype])
    close("output", step.output, expected.output[rank])
    close("gradient of x", step.grad_x, expected.grad_x[rank])
    close("gradient of the probabilities", step.grad_probs, expected.grad_probs[rank])
    own = own_experts(case, rank, expected.grad_experts).tensors()
    for name, actual, wanted in zip(("gate", "up", "down"), step.grad_experts.tensors(), own, strict=True):
        close(f"gradient of {name}", actual, wanted)


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """In relative L2. What must be zero must be exactly zero."""
    assert actual.shape == expected.shape, name
    error, size = (actual.double() - expected).norm(), expected.norm()
    assert error <= tolerance * size, f"{name}: relative L2 error {error / size:.3g}"
