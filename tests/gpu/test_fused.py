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
from megatron_ep_v2.probe import probe
from tests.helpers.carriers import v2_carrier
from tests.helpers.cases import Layout
from tests.helpers.compare import relative_errors
from tests.helpers.fp8_oracle import arrived
from tests.helpers.harness import run_ranks
from tests.helpers.progress import say

RANKS = torch.cuda.device_count()
HIDDEN, TOPK, TOKENS = 512, 4, 128
LAYOUTS = {"compact": [Layout(False)], "expanded": [Layout(True), Layout(True, 128)]}


def runs() -> dict[str, list[Layout]]:
    """Every carrier that is installed here, and the reference -> the layouts that it delivers."""
    installed = (*probe().carriers, REFERENCE)
    return {name: [each for way in CARRIERS[name].layouts for each in LAYOUTS.get(way, [])] for name in installed}


def batch(rank: int, num_experts: int) -> dict[str, torch.Tensor]:
    """Uneven: rank 1 has no token; some selections are dropped. Values are made on the host, the same everywhere."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 0 if rank == 1 else TOKENS - rank
    topk_idx = torch.rand(tokens, num_experts, generator=generator).topk(TOPK, dim=1).indices
    return {
        "x": torch.randn(tokens, HIDDEN, generator=generator).bfloat16(),
        "grad": torch.randn(tokens, HIDDEN, generator=generator).bfloat16(),
        "topk_idx": topk_idx.masked_fill(torch.rand(topk_idx.shape, generator=generator) < 0.2, -1),
        "probs": torch.rand(tokens, TOPK, generator=generator),
        "scale": 0.5 + torch.rand(num_experts, generator=torch.Generator().manual_seed(99)),
    }


def layer(group: Any, layout: Layout) -> dict[str, torch.Tensor]:
    """Expert e multiplies by scale[e]; rows are weighted by their probabilities. Output and both gradients."""
    num_local = 4
    num_experts = num_local * group.size()
    values = {name: tensor.cuda() for name, tensor in batch(group.rank(), num_experts).items()}
    x, probs = values["x"].requires_grad_(), values["probs"].requires_grad_()
    scale = values["scale"][group.rank() * num_local :][:num_local]
    rows, idx, row_probs, counts, handle = fused_dispatch(
        x, values["topk_idx"], probs, num_experts, group, True, True, **layout.arguments()
    )
    if layout.do_expand:
        factor = scale.repeat_interleave(counts.cuda()) * row_probs
    else:
        factor = (scale[idx.clamp(min=0)] * row_probs).masked_fill(idx < 0, 0.0).sum(dim=1)
    y, _ = fused_combine((rows.float() * factor[:, None]).bfloat16(), group, handle, True, True)
    y.backward(values["grad"])
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


def expected(rank: int, num_experts: int, wire: tuple[str, str] = ("bf16", "bf16")) -> dict[str, torch.Tensor]:
    """In fp64, without any communication, on the rows and gradients that arrive in these formats."""
    values = batch(rank, num_experts)
    x, grad, topk_idx = arrived(values["x"], wire[0]), arrived(values["grad"], wire[1]), values["topk_idx"]
    scale = values["scale"].double()[topk_idx.clamp(min=0)].masked_fill(topk_idx < 0, 0.0)
    factor = (scale * values["probs"].double()).sum(dim=1, keepdim=True)
    return {"output": x * factor, "grad_x": grad * factor, "grad_probs": scale * (x * grad).sum(dim=1, keepdim=True)}


def check_layers(by_rank: list[Any], wire: tuple[str, str] = ("bf16", "bf16")) -> None:
    for rank, by_run in enumerate(by_rank):
        assert by_run.keys() == {(kind, layout) for kind, layouts in runs().items() for layout in layouts}
        for run, result in by_run.items():
            for name, error in relative_errors(result, expected(rank, 4 * RANKS, wire)).items():
                # What arrives is exact in bf16. bf16 rounds rows, partial sums and sums, each by at most 2**-9
                assert error < 6e-3, f"rank {rank}, {run}, {name}: relative L2 {error:.1e}"


def test_outputs_and_gradients_against_fp64() -> None:
    say(f"carriers that are not here: {', '.join(CARRIERS.keys() - runs().keys()) or 'none'}")
    check_layers(run_ranks(RANKS, all_layers, backend="nccl"))


def handles_alive(group: Any) -> list[str]:
    """Which of three ways of using a handle leave it alive."""
    settings.activate(settings.resolve(buffer=v2_carrier()))
    values = {name: tensor.cuda() for name, tensor in batch(0, 4 * group.size()).items()}
    alive = []

    def run(way: str) -> weakref.ref[Any]:
        x = values["x"].clone().requires_grad_(way == "train")
        rows, _, _, _, handle = fused_dispatch(
            x, values["topk_idx"], values["probs"], 4 * group.size(), group, True, True, do_expand=True
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
