"""One MoE layer whose every result is a matter of order alone: the bits of what each layout delivers and returns."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch


@dataclass(frozen=True)
class Size:
    """Of one layer; `experts` in the whole group."""

    device: str
    buffer: str
    dtype: torch.dtype
    tokens: int
    hidden: int
    experts: int
    topk: int


# fp32, because torch rounds what it adds up in bf16 on a CPU (embedding_bag) in another way than elsewhere.
ON_CPU = Size("cpu", "reference", torch.float32, 64, 256, 8, 4)
# A batch of many rows for each expert: their order without the mode then differs between any two dispatches.
ON_GPU = Size("cuda", "elastic", torch.bfloat16, 4096, 2048, 128, 8)


class _WeightedRows(torch.autograd.Function):
    """Expert e multiplies its rows by factor[e], and their probabilities weight them: one bf16 row for each pick, of
    one token in the order of its columns added up in fp32, in the forward and in the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probs: torch.Tensor, factor: torch.Tensor, idx: Any, order: Any) -> Any:
        row, expert = order
        ctx.save_for_backward(x, probs, factor, row, expert)
        ctx.idx = idx
        weights = factor[expert] * (probs if idx is None else probs[row, _column(idx, row, expert)])
        return _add_up(x[row].float() * weights[:, None], x, idx, row, expert)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, probs, factor, row, expert = ctx.saved_tensors
        column = None if ctx.idx is None else _column(ctx.idx, row, expert)
        weights = factor[expert] * (probs if column is None else probs[row, column])
        grad_x = _add_up(grad[row].float() * weights[:, None], x, ctx.idx, row, expert)
        by_pick = factor[expert] * (grad[row].float() * x[row].float()).sum(dim=1)
        grad_probs = by_pick if column is None else torch.zeros_like(probs).index_put((row, column), by_pick)
        return grad_x, grad_probs, None, None, None


def _column(idx: torch.Tensor, row: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Where in its row each pick stands."""
    return (idx[row] == expert[:, None]).int().argmax(dim=1)


def _add_up(by_pick: torch.Tensor, x: torch.Tensor, idx: Any, row: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    rounded = by_pick.to(x.dtype)
    if idx is None:
        return rounded  # expanded: one row for each pick; combine adds them up
    total = torch.zeros(x.shape, device=x.device)
    column = _column(idx, row, expert)
    for k in range(idx.shape[1]):
        here = column == k  # each row at most once
        total[row[here]] += rounded[here].float()
    return total.to(x.dtype)


def bits_of_a_layer(group: Any, size: Size, expand: bool) -> dict[str, str]:
    """Fingerprints of the rows sorted by expert, a weight gradient, the output and both gradients."""
    generator = torch.Generator().manual_seed(group.rank())
    experts, local = size.experts, size.experts // group.size()
    x, grad = (torch.randn(size.tokens, size.hidden, generator=generator).to(size.dtype) for _ in range(2))
    top = torch.rand(size.tokens, experts, generator=generator).topk(size.topk, dim=1)
    factor = 0.5 + torch.rand(local, generator=generator)
    x, grad, factor, picks, probs = (t.to(size.device) for t in (x, grad, factor, top.indices, top.values))
    x, probs = x.requires_grad_(), probs.contiguous().requires_grad_()

    recv_x, idx, recv_probs, counts, handle = fused_dispatch(x, picks, probs, experts, group, do_expand=expand)
    counts = counts.to(size.device)
    if expand:
        expert = torch.arange(local, device=size.device).repeat_interleave(counts)
        row = torch.arange(len(expert), device=size.device)
    else:
        row, column = (idx >= 0).nonzero(as_tuple=True)
        expert, by_expert = idx[row, column].sort(stable=True)
        row = row[by_expert]
    rows = recv_x.detach()[row]
    y = fused_combine(_WeightedRows.apply(recv_x, recv_probs, factor, idx, (row, expert)), group, handle)[0]
    y.backward(grad)
    weight_grad = rows[: int(counts[0]), :128].T.float() @ rows[: int(counts[0])].float()  # of the first expert
    results = {"rows": rows, "weight grad": weight_grad, "output": y, "grad_x": x.grad, "grad_probs": probs.grad}
    return {name: _fingerprint(tensor) for name, tensor in results.items()}


def _fingerprint(tensor: torch.Tensor) -> str:
    """Of the values; zeros of both signs are equal."""
    values = tensor.detach() + 0.0
    return hashlib.sha256(values.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:16]


def repeat(group: Any, size: Size, deterministic: bool, repeats: int, torchs_mode: bool = False) -> dict[bool, Any]:
    """Layout (whether expanded) -> name -> the fingerprints of each repeat."""
    settings.activate(settings.resolve(buffer=size.buffer, deterministic=deterministic))
    torch.use_deterministic_algorithms(torchs_mode)
    try:
        found: dict[bool, Any] = {}
        for expand in (False, True):
            layers = [bits_of_a_layer(group, size, expand) for _ in range(repeats)]
            found[expand] = {name: [layer[name] for layer in layers] for name in layers[0]}
        return found
    finally:
        torch.use_deterministic_algorithms(False)
        pool.destroy_buffers()
        settings.activate(None)
