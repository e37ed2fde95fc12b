"""Rows sorted by expert for SwiGLU experts, what comes out in fp64, and the same rows in a layout of fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.layouts.places import place_contiguous
from tests.helpers.compare import relative_errors
from tests.helpers.dense_oracle import Experts, dense_moe

NAN = float("nan")
SIZES = {
    "uneven": [3, 0, 5, 1],
    "one takes all": [0, 11, 0, 0],
    "nothing": [0, 0, 0, 0],
    "even": [8, 8, 8, 8],
}


@dataclass
class ExpertRows:
    """Rows sorted by expert, weights, and the gradient of the output, in one dtype and on one device."""

    sizes: list[int]
    x: torch.Tensor
    probs: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    grad: torch.Tensor


def expert_rows(
    sizes: list[int], hidden: int = 16, ffn: int = 24, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> ExpertRows:
    generator = torch.Generator(device).manual_seed(sum(sizes))

    def normal(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(kind)

    rows, experts = sum(sizes), len(sizes)
    return ExpertRows(
        sizes,
        x=normal(rows, hidden),
        probs=torch.rand(rows, generator=generator, device=device),
        w1=normal(experts, 2 * ffn, hidden) * hidden**-0.5,
        w2=normal(experts, hidden, ffn) * ffn**-0.5,
        grad=normal(rows, hidden),
    )


def expert_of_rows(b: ExpertRows) -> torch.Tensor:
    return torch.arange(len(b.sizes)).repeat_interleave(torch.tensor(b.sizes)).to(b.x.device)


def expected(b: ExpertRows) -> dict[str, torch.Tensor]:
    """Output and gradients in fp64: each row selects one expert."""
    expert = expert_of_rows(b)
    weights = Experts.of_stacked(b.w1, b.w2)
    whole = dense_moe([b.x], [expert[:, None]], [b.probs[:, None]], weights, [b.grad])
    w1, w2 = whole.grad_experts.stacked()
    return {
        "output": whole.output[0],
        "x": whole.grad_x[0],
        "probs": whole.grad_probs[0][:, 0],
        "w1": w1,
        "w2": w2,
    }


def run(function: Any, b: ExpertRows, groups: Groups, backend: str) -> dict[str, torch.Tensor]:
    """The same of the code under test."""
    x, probs, w1, w2 = (t.detach().clone().requires_grad_() for t in (b.x, b.probs, b.w1, b.w2))
    y = function(x, probs, w1, w2, groups, backend)
    y.backward(b.grad)
    return {"output": y.detach(), "x": x.grad, "probs": probs.grad, "w1": w1.grad, "w2": w2.grad}


def with_tail(b: ExpertRows, num_rows: int, alignment: int) -> tuple[ExpertRows, Groups, torch.Tensor]:
    """The batch in a contiguous layout of fixed size: zero padding between experts as a gather leaves it, NaN after
    the last one in rows, probabilities and gradients. And the slots of the batch's rows."""
    places = place_contiguous(expert_of_rows(b)[:, None], None, len(b.sizes), num_rows, alignment)
    assert not int(places.overflow)
    slots = places.slots[:, 0].long()
    tail = int(places.ends[-1])

    def spread(rows: torch.Tensor) -> torch.Tensor:
        out = rows.new_zeros(num_rows, *rows.shape[1:])
        out[slots], out[tail:] = rows, NAN
        return out

    moved = ExpertRows(b.sizes, spread(b.x), spread(b.probs), b.w1, b.w2, spread(b.grad))
    return moved, Groups.from_places(places), slots


def gradcheck_inputs(tail: bool) -> tuple[list[torch.Tensor], Groups]:
    """A tiny batch in fp64 for `gradcheck`: x, probs, w1, w2; in a layout of fixed size if there is to be a `tail`."""
    b = expert_rows([3, 0, 2], hidden=4, ffn=3, dtype=torch.float64)
    b.probs = b.probs.double()
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    if tail:
        b, groups, _ = with_tail(b, 12, 2)
        b.x.nan_to_num_(1), b.probs.nan_to_num_(1)  # differences of NaN say nothing
    return [t.requires_grad_() for t in (b.x, b.probs, b.w1, b.w2)], groups


def check(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], most: float) -> None:
    """Relative L2 of each tensor is at most this; zero where the oracle is zero."""
    for name, error in relative_errors(ours, theirs).items():
        assert error <= most, f"{name}: {error:.1e}"
