"""Decode on GPUs: a CUDA graph for each bucket, and one compiled kernel of each kind for it."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from moe import own_package
from sync_free_layers import Sizes

from megatron_ep_v2 import settings
from megatron_ep_v2.layouts import gather_rows, gather_weights, place_contiguous, reduce_rows, rows_that_fit
from megatron_ep_v2.serving import Decode, DecodeGraphs, PrepareFinalize, buckets_up_to

RANKS = torch.cuda.device_count()
SIZES = Sizes()
TOLERANCE = 1.5e-2  # bf16 rounds rows, partial sums and sums, each by at most 2**-9
BUCKETS = buckets_up_to(512)

pytestmark = pytest.mark.timeout(500)


def factor(expert: torch.Tensor) -> torch.Tensor:
    """Experts multiply by a number of their own, exact in bf16."""
    return 1.0 + (expert % 8).to(torch.float32) / 8


def experts(group: Any, work: Decode) -> torch.Tensor:
    """Through the places of a grouped GEMM, as real experts are run."""
    local = SIZES.experts // group.size()
    num_rows = rows_that_fit(work.topk_idx.numel(), local, 1)
    places = place_contiguous(work.topk_idx, work.num_recv, local, num_rows, 1)
    mine = places.m_indices.clamp(min=0) + group.rank() * local
    scale = gather_weights(work.topk_weights, places) * factor(mine)
    return reduce_rows((gather_rows(work.rows, places) * scale[:, None]).bfloat16(), places)


@own_package
def decode(group: Any) -> dict[int, float]:
    """Bucket -> the worst relative L2 error of three replays, with fewer tokens than the bucket holds on some ranks."""
    settings.activate(settings.resolve(buffer="elastic", num_max_tokens_per_rank=BUCKETS[-1]))
    pair = PrepareFinalize(
        group, hidden=SIZES.hidden, num_experts=SIZES.experts, num_topk=SIZES.topk, max_prefill_tokens=BUCKETS[-1]
    )
    graphs = DecodeGraphs(pair, lambda work: experts(group, work), "cuda")
    graphs.capture()
    worst = {}
    for bucket in BUCKETS:
        worst[bucket] = 0.0
        for turn in range(3):
            generator = torch.Generator("cuda").manual_seed(100 * turn + group.rank())
            tokens = max(0, bucket - (group.rank() + turn) % 3)
            x = torch.randn(tokens, SIZES.hidden, generator=generator, device="cuda").bfloat16()
            scores = torch.rand(tokens, SIZES.experts, generator=generator, device="cuda")
            weights, picks = scores.topk(SIZES.topk, dim=1)
            y = graphs(x, picks, weights, bucket=bucket)
            expected = x.double() * (weights * factor(picks)).double().sum(dim=1, keepdim=True)
            if tokens:
                worst[bucket] = max(worst[bucket], float((y.double() - expected).norm() / expected.norm()))
    return worst


def kernels_of_decode(cache: Path) -> Counter[str]:
    """Compiled kernels of this shape, by name and bucket: all have capacity, experts and top-k in this order."""
    count: Counter[str] = Counter()
    shape = re.compile(rf"_impl<.*\b({2 * SIZES.hidden}|{SIZES.hidden})\b.*, (\d+), {SIZES.experts}, {SIZES.topk}\b")
    for source in cache.glob("cache/kernel.*/kernel.cu"):
        found = shape.search(source.read_text())
        if found and int(found.group(2)) in BUCKETS:
            count[f"{source.parent.name.split('.')[1]} {found.group(2)}"] += 1
    return count


def test_decode_replays_a_graph_for_each_bucket_and_compiles_one_kernel_of_each_kind(tmp_path: Path) -> None:
    cache = Path(os.environ.get("EP_JIT_CACHE_DIR", tmp_path))  # kernels may be there from an earlier run
    env = {"EP_JIT_CACHE_DIR": str(cache)}
    answers = run_ranks(RANKS, decode, backend="nccl", timeout=400, env=env, fresh=True)
    for rank, worst in enumerate(answers):
        for bucket, error in worst.items():
            assert error < TOLERANCE, f"rank {rank}, bucket {bucket}: relative L2 {error:.1e}"
    count = kernels_of_decode(cache)
    print(f"{sum(count.values())} kernels for {len(BUCKETS)} buckets: {dict(count)}")
    for name in ("dispatch", "dispatch_copy_epilogue", "combine", "combine_reduce_epilogue"):
        assert {key: n for key, n in count.items() if key.split()[0] == name} == {f"{name} {b}": 1 for b in BUCKETS}
