"""Decode on GPUs: a CUDA graph for each bucket, and one compiled kernel of each kind for it.

A new kernel takes deep_ep 2.5 s, whatever the number of ranks: each rank compiles it. Four buckets are 16 kernels,
40 s; all ten, with MCORE_DEEPEP_V2_TEST_BUCKETS=all, are 40 kernels, 100 s. Seconds where the cache has them already.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.layouts import gather_rows, gather_weights, place_contiguous, reduce_rows, rows_that_fit
from megatron_ep_v2.serving import Decode, DecodeGraphs, PrepareFinalize, buckets_up_to
from tests.helpers.carriers import v2_carrier
from tests.helpers.compare import relative_error
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.jit import Kernel, compiled_kernels
from tests.helpers.progress import say
from tests.helpers.shapes import GPU

RANKS = gpu_ranks()
TOLERANCE = 1.5e-2  # bf16 rounds rows, partial sums and sums, each by at most 2**-9
MOST = 512
ALL = os.environ.get("MCORE_DEEPEP_V2_TEST_BUCKETS") == "all"
BUCKETS = buckets_up_to(MOST) if ALL else [1, 8, 64, MOST]
KINDS = ("dispatch", "dispatch_copy_epilogue", "combine", "combine_reduce_epilogue")


def factor(expert: torch.Tensor) -> torch.Tensor:
    """Experts multiply by a number of their own, exact in bf16."""
    return 1.0 + (expert % 8).to(torch.float32) / 8


def experts(group: Any, work: Decode) -> torch.Tensor:
    """Through the slots of a grouped GEMM, as real experts are run."""
    local = GPU.experts // group.size()
    num_rows = rows_that_fit(work.topk_idx.numel(), local, 1)
    places = place_contiguous(work.topk_idx, work.num_recv, local, num_rows, 1)
    mine = places.m_indices.clamp(min=0) + group.rank() * local
    scale = gather_weights(work.topk_weights, places) * factor(mine)
    return reduce_rows((gather_rows(work.rows, places) * scale[:, None]).bfloat16(), places)


@isolated
def decode(group: Any) -> dict[int, list[float]]:
    """Bucket -> relative L2 errors of three replays, with fewer tokens than the bucket holds on some ranks."""
    settings.activate(settings.resolve(buffer=v2_carrier(), num_max_tokens_per_rank=MOST))
    pair = PrepareFinalize(
        group, hidden=GPU.hidden, num_experts=GPU.experts, num_topk=GPU.topk, max_prefill_tokens=MOST
    )
    graphs = DecodeGraphs(pair, lambda work: experts(group, work), "cuda")
    for bucket in BUCKETS[::-1]:  # the largest first, as all of them would be
        say(f"bucket {bucket}: compile and capture", group)
        graphs.capture([bucket])
    say("replays", group)
    errors: dict[int, list[float]] = {bucket: [] for bucket in BUCKETS}
    for bucket in BUCKETS:
        for turn in range(3):
            generator = torch.Generator("cuda").manual_seed(100 * turn + group.rank())
            tokens = max(0, bucket - (group.rank() + turn) % 3)
            x = torch.randn(tokens, GPU.hidden, generator=generator, device="cuda").bfloat16()
            scores = torch.rand(tokens, GPU.experts, generator=generator, device="cuda")
            weights, topk_idx = scores.topk(GPU.topk, dim=1)
            y = graphs(x, topk_idx, weights, bucket=bucket)
            expected = x.double() * (weights * factor(topk_idx)).double().sum(dim=1, keepdim=True)
            if tokens:
                errors[bucket].append(relative_error(y, expected))
    return errors


def kernels_of_decode() -> set[Kernel]:
    kernels = compiled_kernels(GPU.hidden, GPU.experts, GPU.topk)
    return {kernel for kernel in kernels if kernel.num_max_tokens_per_rank in BUCKETS}


def test_decode_replays_a_graph_for_each_bucket_and_compiles_one_kernel_of_each_kind() -> None:
    before = kernels_of_decode()
    answers = run_ranks(RANKS, decode, backend="nccl")
    after = kernels_of_decode()
    for rank, by_bucket in enumerate(answers):
        for bucket, errors in by_bucket.items():
            assert all(error < TOLERANCE for error in errors), f"rank {rank}, bucket {bucket}: relative L2 {errors}"
    compiled = Counter((kernel.kind, kernel.num_max_tokens_per_rank) for kernel in after - before)
    print(f"{compiled.total()} kernels compiled for {len(BUCKETS)} buckets, {len(before)} were there: {dict(compiled)}")
    kinds = {(kernel.kind, kernel.num_max_tokens_per_rank) for kernel in after}
    assert kinds == {(kind, bucket) for kind in KINDS for bucket in BUCKETS}
    assert not [kind for kind, count in compiled.items() if count > 1]
