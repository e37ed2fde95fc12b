"""One MoE layer whose every result is a matter of order alone: the bits of what each layout delivers and returns."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from tests.helpers.shapes import Shape


class _WeightedRows(torch.autograd.Function):
    """Expert e multiplies its rows by factor[e], and their probabilities weight them: one bf16 row for each selection,
    of one token in the order of its columns added up in fp32, in the forward and in the backward."""

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
        by_selection = factor[expert] * (grad[row].float() * x[row].float()).sum(dim=1)
        grad_probs = by_selection if column is None else torch.zeros_like(probs).index_put((row, column), by_selection)
        return grad_x, grad_probs, None, None, None


def _column(idx: torch.Tensor, row: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """The column of each selection in its row."""
    return (idx[row] == expert[:, None]).int().argmax(dim=1)


def _add_up(
    by_selection: torch.Tensor, x: torch.Tensor, idx: Any, row: torch.Tensor, expert: torch.Tensor
) -> torch.Tensor:
    rounded = by_selection.to(x.dtype)
    if idx is None:
        return rounded  # expanded: one row for each selection; combine adds them up
    total = torch.zeros(x.shape, device=x.device)
    column = _column(idx, row, expert)
    for k in range(idx.shape[1]):
        here = column == k  # each row at most once
        total[row[here]] += rounded[here].float()
    return total.to(x.dtype)


def bits_of_a_layer(group: Any, shape: Shape, expand: bool) -> dict[str, str]:
    """Fingerprints of the rows sorted by expert, a weight gradient, the output and both gradients."""
    generator = torch.Generator().manual_seed(group.rank())
    experts, local = shape.experts, shape.experts // group.size()
    x, grad = (torch.randn(shape.tokens, shape.hidden, generator=generator).to(shape.dtype) for _ in range(2))
    top = torch.rand(shape.tokens, experts, generator=generator).topk(shape.topk, dim=1)
    factor = 0.5 + torch.rand(local, generator=generator)
    x, grad, factor, topk_idx, probs = (t.to(shape.device) for t in (x, grad, factor, top.indices, top.values))
    x, probs = x.requires_grad_(), probs.contiguous().requires_grad_()

    recv_x, idx, recv_probs, counts, handle = fused_dispatch(x, topk_idx, probs, experts, group, do_expand=expand)
    counts = counts.to(shape.device)
    if expand:
        expert = torch.arange(local, device=shape.device).repeat_interleave(counts)
        row = torch.arange(len(expert), device=shape.device)
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


def repeat(group: Any, shape: Shape, deterministic: bool, repeats: int, torchs_mode: bool = False) -> dict[bool, Any]:
    """Layout (whether expanded) -> name -> the fingerprints of each repeat."""
    settings.activate(settings.resolve(buffer=shape.buffer, deterministic=deterministic))
    torch.use_deterministic_algorithms(torchs_mode)
    try:
        found: dict[bool, Any] = {}
        for expand in (False, True):
            layers = [bits_of_a_layer(group, shape, expand) for _ in range(repeats)]
            found[expand] = {name: [layer[name] for layer in layers] for name in layers[0]}
        return found
    finally:
        torch.use_deterministic_algorithms(False)
        pool.destroy_buffers()
        settings.activate(None)
