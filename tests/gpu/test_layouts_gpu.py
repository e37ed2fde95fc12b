"""Layouts and experts on GPUs: the Triton kernels against their references, all of it inside CUDA graphs and without a
host wait, every backend of the experts against fp64, DeepGEMM on 8-bit payloads as we deliver them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import swiglu_experts
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.layouts import (
    Places,
    gather_payload,
    gather_rows,
    gather_weights,
    place_contiguous,
    place_masked,
    reduce_rows,
)
from megatron_ep_v2.wire import quantize
from megatron_ep_v2.wire.formats import FORMATS
from tests.helpers.carriers import v2_carrier
from tests.helpers.cases import Case
from tests.helpers.compare import relative_error
from tests.helpers.expert_rows import NAN, check, expected, expert_rows, run, with_tail
from tests.helpers.experts_layer import WAYS, errors, train_each_way
from tests.helpers.fused_layer import Step
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.layout_kernels import column_cases, differences, move_cases, slot_cases, swiglu_cases, tally_cases
from tests.helpers.layout_oracle import routing
from tests.helpers.progress import say

RANKS = gpu_ranks()
needs_deep_gemm = pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is None, reason="needs deep_gemm")
BACKENDS = ["grouped", "sequential", pytest.param("deepgemm", marks=needs_deep_gemm)]


def test_the_kernels_equal_the_references() -> None:
    """Bit by bit; SwiGLU and dot products as close as another order of sums is."""
    from megatron_ep_v2.kernels import move_triton, places_triton, swiglu_triton

    say("slots")
    wrong = differences(slot_cases(places_triton, "cuda")) + differences(tally_cases(places_triton, "cuda"))
    say("moves")
    wrong += differences(
        move_cases(move_triton, "cuda", [(24, 3), (2048, 8), (7168, 8)], [torch.bfloat16], [torch.float8_e4m3fn])
    )
    wrong += differences(move_cases(move_triton, "cuda", [(96, 4)], [torch.float32], []))
    say("columns, SwiGLU")
    wrong += differences(column_cases(move_triton, "cuda"))
    wrong += differences(swiglu_cases(swiglu_triton, "cuda", [torch.bfloat16, torch.float32], [33, 768]))
    assert wrong == []


def laid_out(way: str, topk_idx: torch.Tensor, num_recv: torch.Tensor) -> Places:
    if way == "masked":
        return place_masked(topk_idx, num_recv, 6, 24)
    return place_contiguous(topk_idx, num_recv, 6, 1024 if way == "aligned" else 256, 128 if way == "aligned" else 32)


@pytest.mark.parametrize("way", ["aligned", "overflow", "masked"])
def test_a_graph_replays_what_runs_eagerly(way: str) -> None:
    """Slots, rows there, experts, rows back, and all gradients: captured once, replayed on other routings. No call
    may wait for the device, and NaN in rows that were not received reaches nothing."""
    rows, topk, hidden, ffn = 37, 5, 256, 128
    weights = expert_rows([0] * 6, hidden, ffn, torch.bfloat16, "cuda")
    w1, w2 = weights.w1.requires_grad_(), weights.w2.requires_grad_()
    static: dict[str, Any] = {
        "topk_idx": torch.empty(rows, topk, dtype=torch.int64, device="cuda"),
        "num_recv": torch.empty((), dtype=torch.int32, device="cuda"),
        "x": torch.empty(rows, hidden, dtype=torch.bfloat16, device="cuda").requires_grad_(),
        "probs": torch.empty(rows, topk, device="cuda").requires_grad_(),
        "grad": torch.empty(rows, hidden, dtype=torch.bfloat16, device="cuda"),
    }

    def fill(kind: str, seed: int) -> None:
        r = routing(kind, rows=rows, topk=topk, num_experts=6, seed=seed)
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            static["topk_idx"].copy_(r.topk_idx)
            static["num_recv"].fill_(r.num_recv)
            for name in ("x", "probs", "grad"):
                static[name].normal_(generator=generator)
                static[name][r.num_recv :] = NAN

    def layer_step() -> list[torch.Tensor]:
        places = laid_out(way, static["topk_idx"], static["num_recv"])
        y = swiglu_experts(
            gather_rows(static["x"], places),
            gather_weights(static["probs"], places),
            *(w1, w2, Groups.from_places(places), "grouped"),
        )
        back = reduce_rows(y, places)
        weighted = reduce_rows(y.detach(), places, static["probs"])
        gradients = torch.autograd.grad(
            [back, weighted], [static["x"], static["probs"], w1, w2], [static["grad"], static["grad"]]
        )
        return [back.detach(), weighted.detach(), *gradients, places.overflow, places.counts]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fill("random", 0)
        layer_step()
        layer_step()
    torch.cuda.synchronize()
    fill("random", 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer_step()
    for seed, kind in enumerate(("random", "one", "sparse", "all", "nothing", "random")):
        fill(kind, seed + 1)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for ours, eager in zip(replayed, layer_step(), strict=True):
            assert torch.equal(ours, eager), f"{kind}: replay and eager run differ"
            assert torch.isfinite(ours.float()).all(), f"{kind}: NaN of rows that were not received"
        assert kind == "nothing" or replayed[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", [False, True], ids=["exact", "unowned rows"])
def test_experts_against_fp64(backend: str, tail: bool) -> None:
    b = expert_rows([300, 0, 1, 77, 512, 0, 128, 5], hidden=512, ffn=256, dtype=torch.bfloat16, device="cuda")
    wanted = expected(b)
    if not tail:
        groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
        check(run(swiglu_experts, b, groups, backend), wanted, 1e-2)
        on_device = Groups.from_counts(torch.tensor(b.sizes, device="cuda"), b.x)
        check(run(swiglu_experts, b, on_device, backend), wanted, 1e-2)
        return
    moved, groups, slots = with_tail(b, 2048, 128)
    ours = run(swiglu_experts, moved, groups, backend)
    for name in ("output", "x", "probs"):
        ours[name] = ours[name][slots]
    check(ours, wanted, 1e-2)


@isolated
def train(group: Any, case: Case, backends: list[str]) -> dict[tuple[str, str], Step]:
    settings.activate(settings.resolve(buffer=v2_carrier()))
    return train_each_way(group, case, WAYS, backends, "cuda")


def test_whole_layers_against_fp64() -> None:
    tokens = tuple(128 - 3 * rank for rank in range(RANKS))
    sizes: dict[str, Any] = {"topk": 4, "hidden": 512, "ffn": 256, "dtype": torch.bfloat16}
    case = Case("idle expert", tokens, "drop some, idle expert", experts=4 * RANKS, **sizes)
    backends = ["grouped", *(["deepgemm"] if importlib.util.find_spec("deep_gemm") else [])]
    found = errors(case, run_ranks(RANKS, train, case, backends, backend="nccl"))
    assert len(found) == RANKS * len(WAYS) * len(backends) * 6
    worst = max(found, key=found.__getitem__)
    assert found[worst] < 1.2e-2, f"{worst}: relative L2 {found[worst]:.1e}"  # bf16 rounds h, a, y and partial sums


@needs_deep_gemm
@pytest.mark.parametrize("way", ["contiguous", "masked"])
def test_deepgemm_takes_the_payloads_as_they_are_delivered(way: str) -> None:
    """e4m3 rows with fp32 scales, mn-major; against fp64 on the numbers that the payload stands for."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    import deep_gemm

    experts, hidden, columns = 6, 512, 256
    r = routing("random", rows=150, topk=5, num_experts=experts)
    topk_idx, num_recv = r.topk_idx.cuda(), torch.tensor(r.num_recv, dtype=torch.int32, device="cuda")
    x = torch.randn(150, hidden, device="cuda").bfloat16()
    payload = quantize.quantize(x, FORMATS["fp8"])
    weights = torch.randn(experts, columns, hidden, device="cuda")
    blocks = weights.view(experts, columns // 128, 128, hidden // 128, 128)
    scales = torch.exp2((blocks.abs().amax(dim=(2, 4)) / 448).log2().ceil())
    codes = (blocks / scales[:, :, None, :, None]).view_as(weights).to(torch.float8_e4m3fn)
    exact = (codes.double().view_as(blocks) * scales.double()[:, :, None, :, None]).view_as(weights)
    rows = quantize.dequantize(*payload, FORMATS["fp8"], torch.float64)

    places = place_contiguous(topk_idx, num_recv, experts, 1024) if way == "contiguous" else place_masked(
        topk_idx, num_recv, experts, 128
    )  # fmt: skip
    values, row_scales = gather_payload(payload, places, "mn_major")
    out = torch.full((*values.shape[:-1], columns), NAN, dtype=torch.bfloat16, device="cuda")
    if way == "contiguous":
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((values, row_scales), (codes, scales), out, places.m_indices)
    else:
        deep_gemm.m_grouped_fp8_gemm_nt_masked((values, row_scales), (codes, scales), out, places.counts, 32)
    out = out.view(-1, columns)
    used = places.m_indices >= 0
    wanted = torch.einsum("mk,mnk->mn", rows[places.rows[used].long()], exact[places.m_indices[used].long()])
    assert used.any() and relative_error(out[used], wanted) < 5e-3
