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
    return moved, Groups.from_places(places), slots


def gradcheck_inputs(tail: bool) -> tuple[list[torch.Tensor], Groups]:
    """A tiny batch in fp64 for `gradcheck`: x, probs, w1, w2; in a layout of fixed size if there is to be a `tail`."""
    b = batch([3, 0, 2], hidden=4, ffn=3, dtype=torch.float64)
    b.probs = b.probs.double()
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    if tail:
        b, groups, _ = with_tail(b, 12, 2)
        b.x.nan_to_num_(1), b.probs.nan_to_num_(1)  # differences of NaN say nothing
    return [t.requires_grad_() for t in (b.x, b.probs, b.w1, b.w2)], groups


def check(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], most: float) -> None:
    """Relative L2 of each tensor below `most`; zero where the oracle is zero."""
    for name, wanted in theirs.items():
        assert ours[name].shape == wanted.shape, name
        error = (ours[name].double() - wanted).norm().item()
        assert error <= most * wanted.norm().item(), f"{name}: {error:.1e} of {wanted.norm().item():.1e}"


@dataclass
class Layer:
    """What all ranks hand to one MoE layer, and the weights of all experts."""

    x: list[torch.Tensor]
    picks: list[torch.Tensor]
    probs: list[torch.Tensor]
    grad: list[torch.Tensor]
    w1: torch.Tensor
    w2: torch.Tensor


def layer(
    ranks: int, tokens: int, experts: int, topk: int, hidden: int, ffn: int, dtype: torch.dtype, device: str
) -> Layer:
    """Ranks have different numbers of tokens, some picks are dropped, the last expert is picked by nobody."""
    each = []
    for rank in range(ranks):
        generator = torch.Generator(device).manual_seed(rank)
        mine = tokens - 3 * rank
        x, grad = (torch.randn(mine, hidden, generator=generator, device=device).to(dtype) for _ in range(2))
        top = torch.rand(mine, experts - 1, generator=generator, device=device).topk(topk, dim=1)
        picks = top.indices.masked_fill(torch.rand(mine, topk, generator=generator, device=device) < 0.1, -1)
        each.append((x, picks, top.values.contiguous(), grad))
    weights = batch([0] * experts, hidden, ffn, dtype, device)
    x, picks, probs, grad = (list(column) for column in zip(*each, strict=True))
    return Layer(x, picks, probs, grad, weights.w1, weights.w2)


def layer_expected(given: Layer) -> list[dict[str, torch.Tensor]]:
    """Output and gradients of each rank in fp64; weights' gradients of all experts, over all ranks."""
    w1, w2 = (t.double().requires_grad_() for t in (given.w1, given.w2))
    x, probs, outputs = [], [], []
    for rank, picks in enumerate(given.picks):
        x.append(given.x[rank].double().requires_grad_())
        probs.append(given.probs[rank].double().requires_grad_())
        out = torch.zeros_like(x[-1])
        for expert in range(len(w1)):
            row, pick = (picks == expert).nonzero(as_tuple=True)
            gate, up = (x[-1][row] @ w1[expert].T).chunk(2, dim=1)
            activated = gate / (1 + torch.exp(-gate)) * up * probs[-1][row, pick][:, None]
            out = out.index_add(0, row, activated @ w2[expert].T)
        outputs.append(out)
    torch.autograd.backward(outputs, [grad.double() for grad in given.grad])
    assert w1.grad is not None and w2.grad is not None
    return [
        {"output": outputs[i].detach(), "x": x[i].grad, "probs": probs[i].grad, "w1": w1.grad, "w2": w2.grad}
        for i in range(len(x))
    ]  # type: ignore[misc]
