"""fused_dispatch and fused_combine on deep_ep's buffers and on the reference, on GPUs, against fp64."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from tests.helpers.harness import run_ranks
from tests.helpers.progress import say

RANKS = torch.cuda.device_count()
HIDDEN, TOPK, TOKENS = 512, 4, 128
COMPACT, EXPANDED, PADDED = (False, 1), (True, 1), (True, 128)  # do_expand, alignment
RUNS = {"elastic": [COMPACT, EXPANDED, PADDED], "legacy": [COMPACT], "reference": [COMPACT, EXPANDED, PADDED]}


def batch(rank: int, num_experts: int) -> dict[str, torch.Tensor]:
    """Uneven: rank 1 has no token; some picks are dropped. Values are made on the host, the same everywhere."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 0 if rank == 1 else TOKENS - rank
    picks = torch.rand(tokens, num_experts, generator=generator).topk(TOPK, dim=1).indices
    return {
        "x": torch.randn(tokens, HIDDEN, generator=generator).bfloat16(),
        "grad": torch.randn(tokens, HIDDEN, generator=generator).bfloat16(),
        "picks": picks.masked_fill(torch.rand(picks.shape, generator=generator) < 0.2, -1),
        "probs": torch.rand(tokens, TOPK, generator=generator),
        "scale": 0.5 + torch.rand(num_experts, generator=torch.Generator().manual_seed(99)),
    }


def layer(group: Any, expand: bool, alignment: int) -> dict[str, torch.Tensor]:
    """Expert e multiplies by scale[e]; rows are weighted by their probabilities. Output and both gradients."""
    num_local = 4
    num_experts = num_local * group.size()
    values = {name: tensor.cuda() for name, tensor in batch(group.rank(), num_experts).items()}
    x, probs = values["x"].requires_grad_(), values["probs"].requires_grad_()
    scale = values["scale"][group.rank() * num_local :][:num_local]
    rows, idx, row_probs, counts, handle = fused_dispatch(
        x, values["picks"], probs, num_experts, group, True, True, do_expand=expand, expert_alignment=alignment
    )
    if expand:
        factor = scale.repeat_interleave(counts.cuda()) * row_probs
    else:
        factor = (scale[idx.clamp(min=0)] * row_probs).masked_fill(idx < 0, 0.0).sum(dim=1)
    y, _ = fused_combine((rows.float() * factor[:, None]).bfloat16(), group, handle, True, True)
    y.backward(values["grad"])
    result = {"output": y, "grad_x": x.grad, "grad_probs": probs.grad}
    return {name: tensor.detach().cpu() for name, tensor in result.items()}


def all_layers(group: Any) -> dict[tuple[str, bool, int], dict[str, torch.Tensor]]:
    """One buffer of each kind for all its layouts."""
    found = {}
    for kind, runs in RUNS.items():
        settings.activate(settings.resolve(buffer=kind))
        for expand, alignment in runs:
            say(f"{kind}, {'expanded' if expand else 'compact'}, alignment {alignment}", group)
            found[kind, expand, alignment] = layer(group, expand, alignment)
        pool.destroy_buffers()
    return found


def expected(rank: int, num_experts: int) -> dict[str, torch.Tensor]:
    """In fp64, without any communication."""
    values = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in batch(rank, num_experts).items()
    }
    picked = values["picks"] >= 0
    scale = values["scale"][values["picks"].clamp(min=0)].masked_fill(~picked, 0.0)
    factor = (scale * values["probs"]).sum(dim=1, keepdim=True)
    return {
        "output": values["x"] * factor,
        "grad_x": values["grad"] * factor,
        "grad_probs": scale * (values["x"] * values["grad"]).sum(dim=1, keepdim=True),
    }


def test_outputs_and_gradients_against_fp64() -> None:
    by_rank = run_ranks(RANKS, all_layers, backend="nccl")
    for rank, by_run in enumerate(by_rank):
        wanted = expected(rank, 4 * RANKS)
        for run, result in by_run.items():
            for name, tensor in result.items():
                assert tensor.shape == wanted[name].shape
                if tensor.numel():
                    error = (tensor.double() - wanted[name]).norm() / wanted[name].norm()
                    # bf16 rounds rows, partial sums and sums, each by at most 2**-9
                    assert error < 6e-3, f"rank {rank}, {run}, {name}: relative L2 {error:.1e}"


def handles_alive(group: Any) -> list[str]:
    """Which of three ways of using a handle leave it alive."""
    settings.activate(settings.resolve(buffer="elastic"))
    values = {name: tensor.cuda() for name, tensor in batch(0, 4 * group.size()).items()}
    alive = []

    def run(way: str) -> weakref.ref[Any]:
        x = values["x"].clone().requires_grad_(way == "train")
        rows, _, _, _, handle = fused_dispatch(
            x, values["picks"], values["probs"], 4 * group.size(), group, True, True, do_expand=True
        )
        seen = weakref.ref(handle)
        y, _ = fused_combine(rows, group, handle, True, True)
        if way == "train":
            losses.append(y.float().sum())  # a loss that the user keeps
            losses[-1].backward()
        return seen

    losses: list[torch.Tensor] = []
    for way in ("train", "eval", "no_grad"):
        with torch.set_grad_enabled(way != "no_grad"):
            seen = run(way)
        gc.collect()
        if seen() is not None:
            alive.append(way)
    pool.destroy_buffers()
    return alive


def test_no_handle_outlives_its_step() -> None:
    assert run_ranks(RANKS, handles_alive, backend="nccl") == [[]] * RANKS
