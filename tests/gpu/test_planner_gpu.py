"""The planner's kernels on a GPU: equal to the definition, without a wait, in a CUDA graph."""

from __future__ import annotations

import torch

from megatron_ep_v2.balance import planner
from megatron_ep_v2.balance.planner import count, map_selections, plan
from tests.helpers.balance_cases import differences, selections


def test_the_kernels_equal_the_definition() -> None:
    from megatron_ep_v2.balance import planner_triton

    assert differences(planner_triton, planner, "cuda", seeds=2, tokens=300) == []


def test_a_graph_plans_and_maps_what_it_is_given() -> None:
    """8 ranks of 16 experts, 4096 tokens, top-8; captured on even selections, replayed on others, no wait anywhere."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        [selections(kind, 4096, 8, 128, generator) for _ in range(8)] for kind in ("random", "zipf", "unselected")
    ]
    topk_idx = [batch.cuda() for batch in batches[0]]

    def run() -> tuple[planner.Plan, torch.Tensor]:
        found = plan(torch.stack([count(each, 128) for each in topk_idx]), 2)
        return found, map_selections(topk_idx[5], found, 5)

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found, mapped = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    replicas = []
    for batch in batches:
        for own, other in zip(topk_idx, batch, strict=True):
            own.copy_(other)
        graph.replay()
        counts = torch.stack([torch.bincount(each[each >= 0], minlength=128) for each in batch])
        wanted = plan(counts, 2)
        for name in ("experts", "starts", "rows", "home_rows", "before"):
            assert getattr(found, name).cpu().equal(getattr(wanted, name)), name
        assert mapped.cpu().equal(map_selections(batch[5], wanted, 5))
        replicas.append(int((wanted.rows > 0).sum()))
    assert replicas[0] == 0 and replicas[1] > 0, "one routing is even, one is not"
