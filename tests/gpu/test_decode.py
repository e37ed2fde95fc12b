"""Decode on GPUs: a CUDA graph for each bucket, and one compiled kernel of each kind for it.

A new kernel takes deep_ep 2.5 s, whatever the number of ranks: each rank compiles it. Four buckets are 16 kernels,
40 s; all ten, with MCORE_DEEPEP_V2_TEST_BUCKETS=all, are 40 kernels, 100 s. Seconds where the cache has them already.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.layouts import gather_rows, gather_weights, place_contiguous, reduce_rows, rows_that_fit
from megatron_ep_v2.serving import Decode, DecodeGraphs, PrepareFinalize, buckets_up_to
from tests.gpu.sync_free_layers import Sizes
from tests.helpers.harness import run_ranks
from tests.helpers.moe import own_package
from tests.helpers.progress import say

RANKS = torch.cuda.device_count()
SIZES = Sizes()
TOLERANCE = 1.5e-2  # bf16 rounds rows, partial sums and sums, each by at most 2**-9
MOST = 512
ALL = os.environ.get("MCORE_DEEPEP_V2_TEST_BUCKETS") == "all"
BUCKETS = buckets_up_to(MOST) if ALL else [1, 8, 64, MOST]
KINDS = ("dispatch", "dispatch_copy_epilogue", "combine", "combine_reduce_epilogue")


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
    settings.activate(settings.resolve(buffer="elastic", num_max_tokens_per_rank=MOST))
    pair = PrepareFinalize(
        group, hidden=SIZES.hidden, num_experts=SIZES.experts, num_topk=SIZES.topk, max_prefill_tokens=MOST
    )
    graphs = DecodeGraphs(pair, lambda work: experts(group, work), "cuda")
    for bucket in BUCKETS[::-1]:  # the largest first, as all of them would be
        say(f"bucket {bucket}: compile and capture", group)
        graphs.capture([bucket])
    say("replays", group)
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


def kernels_of_decode(cache: Path) -> dict[Path, str]:
    """Compiled kernels of this shape -> "kind bucket": all have capacity, experts and top-k in this order."""
    kernels = {}
    shape = re.compile(rf"_impl<.*\b({2 * SIZES.hidden}|{SIZES.hidden})\b.*, (\d+), {SIZES.experts}, {SIZES.topk}\b")
    for source in cache.glob("cache/kernel.*/kernel.cu"):
        found = shape.search(source.read_text())
        if found and int(found.group(2)) in BUCKETS:
            kernels[source.parent] = f"{source.parent.name.split('.')[1]} {found.group(2)}"
    return kernels


def test_decode_replays_a_graph_for_each_bucket_and_compiles_one_kernel_of_each_kind() -> None:
    cache = Path(os.environ.get("EP_JIT_CACHE_DIR", Path.home() / ".deep_ep"))
    before = kernels_of_decode(cache)
    answers = run_ranks(RANKS, decode, backend="nccl")
    after = kernels_of_decode(cache)
    for rank, worst in enumerate(answers):
        for bucket, error in worst.items():
            assert error < TOLERANCE, f"rank {rank}, bucket {bucket}: relative L2 {error:.1e}"
    compiled = Counter(kind for kernel, kind in after.items() if kernel not in before)
    print(f"{compiled.total()} kernels compiled for {len(BUCKETS)} buckets, {len(before)} were there: {dict(compiled)}")
    assert set(after.values()) == {f"{kind} {bucket}" for kind in KINDS for bucket in BUCKETS}
    assert not [kind for kind, count in compiled.items() if count > 1]
