"""Megatron's whole MoE layer on ElasticBuffer with TransformerEngine's grouped experts: features beside alltoall, and
what one forward + backward launches, waits for and holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from harness import run_ranks
from moe_layer import GPU, GPU_FEATURES, compare_with_alltoall, hidden_states, make_layer, megatron, step
from torch.profiler import ProfilerActivity, profile

import megatron_ep_v2

pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine's grouped GEMM")

RANKS = torch.cuda.device_count()
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}

pytestmark = pytest.mark.timeout(500)


def test_every_feature_agrees_with_alltoall() -> None:
    answers = run_ranks(
        RANKS, compare_with_alltoall, GPU, GPU_FEATURES, ("compact", "expanded"), backend="nccl", timeout=200
    )
    for rank, errors in enumerate(answers):
        for case, by_tensor in errors.items():
            for name, error in by_tensor.items():
                # bf16 rounds weighted rows, partial sums and sums, each by at most 2**-9
                assert error < 1.5e-2, f"rank {rank}, {case}, {name}: relative L2 {error:.1e}"


def trace(group: Any) -> dict[str, dict[str, Any]]:
    """Layout -> kernels by name, waits by name, dispatches that wait for counts, peak MiB; one forward + backward."""
    found = {}
    with megatron(GPU):
        hidden = hidden_states(GPU, GPU.tokens)
        for layout in ("compact", "expanded"):
            layer = make_layer(GPU, "flex", layout)
            for _ in range(3):
                step(layer, hidden)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(layer, hidden)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                step(layer, hidden)
                torch.cuda.synchronize()
            events = profiler.events()
            on_gpu = Counter(e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
            waits = Counter(e.name for e in events if e.name in WAITS)
            # The last one is ours, above. deep_ep's own wait spins on host memory and is in no trace: one for each
            # dispatch without a handle, told by its kernel's "not cached" form.
            waits["cudaDeviceSynchronize"] -= 1
            found[layout] = {"kernels": dict(on_gpu), "waits": +waits, "peak_mib": peak / 2**20}
            megatron_ep_v2.destroy_buffers()
    return found


def test_nothing_is_permuted_and_the_host_waits_once() -> None:
    by_rank = run_ranks(RANKS, trace, backend="nccl", timeout=200)
    for found in by_rank:
        compact, expanded = found["compact"], found["expanded"]
        deep_ep = {name: n for name, n in expanded["kernels"].items() if "deep_ep::elastic" in name}
        assert sum(n for name, n in deep_ep.items() if "dispatch_impl" in name) == 2
        assert sum(n for name, n in deep_ep.items() if "combine_impl" in name) == 2
        assert any("permute" in name for name in compact["kernels"]), "the trace would not show a permute"
        assert not [name for name in expanded["kernels"] if "permute" in name]
        assert not expanded["waits"], f"besides the dispatch's own wait: {expanded['waits']}"
        assert expanded["peak_mib"] <= compact["peak_mib"]
    print({layout: (found["peak_mib"], dict(found["waits"])) for layout, found in by_rank[0].items()})
    for name, count in sorted(by_rank[0]["expanded"]["kernels"].items()):
        print(f"{count:4d}  {name[:110]}")
