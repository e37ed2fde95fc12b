"""fused_dispatch and fused_combine on every carrier that is installed, on GPUs, against fp64."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.carriers import CARRIERS, REFERENCE
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.probe import probe
from tests.helpers.carriers import v2_carrier
from tests.helpers.cases import Case, Layout, make_batch
from tests.helpers.compare import relative_errors
from tests.helpers.fp8_oracle import arrived
from tests.helpers.fused_layer import grad_output
from tests.helpers.harness import run_ranks
from tests.helpers.progress import say

RANKS = gpu_ranks()
# Rank 1 has no token. Values are made on the host, the same everywhere.
CASE = Case(
    "uneven",
    tuple(0 if rank == 1 else 128 - rank for rank in range(RANKS)),
    "drop some selections",
    hidden=512,
    topk=4,
    experts=4 * RANKS,
    dtype=torch.bfloat16,
)
SCALE = 0.5 + torch.rand(CASE.experts, generator=torch.Generator().manual_seed(99))
LAYOUTS = {"compact": [Layout(False)], "expanded": [Layout(True), Layout(True, 128)]}


def runs() -> dict[str, list[Layout]]:
    """Every carrier that is installed here, and the reference -> the layouts that it delivers."""
    installed = (*probe().carriers, REFERENCE)
    return {name: [each for way in CARRIERS[name].layouts for each in LAYOUTS.get(way, [])] for name in installed}


def layer(group: Any, layout: Layout) -> dict[str, torch.Tensor]:
    """Expert e multiplies by SCALE[e]; rows are weighted by their probabilities. Output and both gradients."""
    rank, num_local = group.rank(), CASE.local_experts
    batch = make_batch(CASE, rank)
    x, probs = batch.x.cuda().requires_grad_(), batch.topk_weights.cuda().requires_grad_()
    scale = SCALE.cuda()[rank * num_local :][:num_local]
    rows, idx, row_probs, counts, handle = fused_dispatch(
        x, batch.topk_idx.cuda(), probs, CASE.experts, group, True, True, **layout.arguments()
    )
    if layout.do_expand:
        factor = scale.repeat_interleave(counts.cuda()) * row_probs
    else:
        factor = (scale[idx.clamp(min=0)] * row_probs).masked_fill(idx < 0, 0.0).sum(dim=1)
    y, _ = fused_combine((rows.float() * factor[:, None]).bfloat16(), group, handle, True, True)
    y.backward(grad_output(CASE, rank).cuda())
    result = {"output": y, "grad_x": x.grad, "grad_probs": probs.grad}
    return {name: tensor.detach().cpu() for name, tensor in result.items()}


def all_layers(group: Any) -> dict[tuple[str, Layout], dict[str, torch.Tensor]]:
    """One buffer of each kind for all its layouts."""
    found = {}
    for kind, layouts in runs().items():
        settings.activate(settings.resolve(buffer=kind))
        for layout in layouts:
            say(f"{kind}, {layout}", group)
            found[kind, layout] = layer(group, layout)
        pool.destroy_buffers()
    return found


def expected(rank: int, wire: tuple[str, str]) -> dict[str, torch.Tensor]:
    """In fp64, without any communication, on the rows and gradients that arrive in these formats."""
    batch = make_batch(CASE, rank)
    x, grad = arrived(batch.x, wire[0]), arrived(grad_output(CASE, rank), wire[1])
    scale = SCALE.double()[batch.topk_idx.clamp(min=0)].masked_fill(batch.topk_idx < 0, 0.0)
    factor = (scale * batch.topk_weights.double()).sum(dim=1, keepdim=True)
    return {"output": x * factor, "grad_x": grad * factor, "grad_probs": scale * (x * grad).sum(dim=1, keepdim=True)}


def check_layers(by_rank: list[Any], wire: tuple[str, str] = ("bf16", "bf16")) -> None:
    for rank, by_run in enumerate(by_rank):
        assert by_run.keys() == {(kind, layout) for kind, layouts in runs().items() for layout in layouts}
        wanted = expected(rank, wire)
        for run, result in by_run.items():
            for name, error in relative_errors(result, wanted).items():
                # What arrives is exact in bf16. bf16 rounds rows, partial sums and sums, each by at most 2**-9.
                assert error < 6e-3, f"rank {rank}, {run}, {name}: relative L2 {error:.1e}"


def test_outputs_and_gradients_against_fp64() -> None:
    say(f"carriers that are not here: {', '.join(CARRIERS.keys() - runs().keys()) or 'none'}")
    check_layers(run_ranks(RANKS, all_layers, backend="nccl"))


def handles_alive(group: Any) -> list[str]:
    """Which of three ways of using a handle leave it alive."""
    settings.activate(settings.resolve(buffer=v2_carrier()))
    batch, alive = make_batch(CASE, 0), []

    def run(way: str) -> weakref.ref[Any]:
        x = batch.x.cuda().requires_grad_(way == "train")
        rows, _, _, _, handle = fused_dispatch(
            x, batch.topk_idx.cuda(), batch.topk_weights.cuda(), CASE.experts, group, True, True, do_expand=True
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
