"""SwiGLU experts in fp64, row by row of each expert, by autograd: what every backend must agree with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.layouts.places import place_contiguous

NAN = float("nan")
SIZES = {
    "uneven": [3, 0, 5, 1],
    "one takes all": [0, 11, 0, 0],
    "nothing": [0, 0, 0, 0],
    "even": [8, 8, 8, 8],
}


@dataclass
class Batch:
    """Rows sorted by expert, weights, and the gradient of the output, in one dtype and on one device."""

    sizes: list[int]
    x: torch.Tensor
    probs: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    grad: torch.Tensor


def batch(
    sizes: list[int], hidden: int = 16, ffn: int = 24, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Batch:
    generator = torch.Generator(device).manual_seed(sum(sizes))

    def normal(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(kind)

    rows, experts = sum(sizes), len(sizes)
    return Batch(
        sizes,
        x=normal(rows, hidden),
        probs=torch.rand(rows, generator=generator, device=device),
        w1=normal(experts, 2 * ffn, hidden) * hidden**-0.5,
        w2=normal(experts, hidden, ffn) * ffn**-0.5,
        grad=normal(rows, hidden),
    )


def expected(b: Batch) -> dict[str, torch.Tensor]:
    """Output and gradients in fp64."""
    x, probs, w1, w2 = (t.detach().double().requires_grad_() for t in (b.x, b.probs, b.w1, b.w2))
    outputs, start = [], 0
    for expert, size in enumerate(b.sizes):
        rows = slice(start, start + size)
        gate, up = (x[rows] @ w1[expert].T).chunk(2, dim=1)
        activated = gate / (1 + torch.exp(-gate)) * up * probs[rows, None]
        outputs.append(activated @ w2[expert].T)
        start += size
    y = torch.cat(outputs)
    y.backward(b.grad.double())
    gradients = {"x": x.grad, "probs": probs.grad, "w1": w1.grad, "w2": w2.grad}
    # An expert without rows, and a batch without any, has no gradient in autograd's eyes.
    inputs = {"x": x, "probs": probs, "w1": w1, "w2": w2}
    zeros = {name: torch.zeros_like(t) for name, t in inputs.items()}
    return {"output": y.detach()} | {name: zeros[name] if g is None else g for name, g in gradients.items()}


def run(function: Any, b: Batch, groups: Groups, backend: str) -> dict[str, torch.Tensor]:
    """The same of the code under test."""
    x, probs, w1, w2 = (t.detach().clone().requires_grad_() for t in (b.x, b.probs, b.w1, b.w2))
    y = function(x, probs, w1, w2, groups, backend)
    y.backward(b.grad)
    return {"output": y.detach(), "x": x.grad, "probs": probs.grad, "w1": w1.grad, "w2": w2.grad}


def with_tail(b: Batch, num_rows: int, alignment: int) -> tuple[Batch, Groups, torch.Tensor]:
    """The batch in a contiguous layout of fixed size: zero padding between experts as a gather leaves it, NaN behind
    the last one in rows, probabilities and gradients. And where the batch's rows are in it."""
    expert = torch.repeat_interleave(torch.arange(len(b.sizes)), torch.tensor(b.sizes)).to(b.x.device)
    places = place_contiguous(expert[:, None], None, len(b.sizes), num_rows, alignment)
    assert not int(places.overflow)
    slots = places.slots[:, 0].long()
    tail = int(places.ends[-1])

    def spread(rows: torch.Tensor) -> torch.Tensor:
        out = rows.new_zeros(num_rows, *rows.shape[1:])
        out[slots], out[tail:] = rows, NAN
        return out

    moved = Batch(b.sizes, spread(b.x), spread(b.probs), b.w1, b.w2, spread(b.grad))
    return moved, Groups.from_places(places, alignment), slots


def check(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], most: float) -> None:
    """Relative L2 of each tensor below `most`; zero where the oracle is zero."""
    for name, wanted in theirs.items():
        assert ours[name].shape == wanted.shape, name
        error = (ours[name].double() - wanted).norm().item()
        assert error <= most * wanted.norm().item(), f"{name}: {error:.1e} of {wanted.norm().item():.1e}"
