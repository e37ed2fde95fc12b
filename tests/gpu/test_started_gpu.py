"""Calls that are started, on DeepEP's own buffers: the bits of those with the wait, forward and backward, while the
host goes on, and from several streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.experts.counts import RowInfo, attach
from megatron_ep_v2.experts.gemm import GEMMS
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import WeightedSwiglu, linear
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.started_a2a import finish_combine, finish_dispatch, start_combine, start_dispatch
from tests.helpers.carriers import buffer_class, v2_carrier
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.progress import say

RANKS = gpu_ranks()
TOKENS, HIDDEN, FFN, EXPERTS, TOPK = 128, 512, 256, 4 * max(RANKS, 2), 4
LATE = 2_000_000_000  # cycles, about a second


@isolated
def started(group: Any) -> dict[str, Any]:
    chosen = {"buffer": v2_carrier(), "num_max_tokens_per_rank": TOKENS, "deterministic": True}
    settings.activate(settings.resolve(**chosen))
    generator = torch.Generator("cuda").manual_seed(group.rank())
    inputs = torch.randn(TOKENS, HIDDEN, generator=generator, device="cuda").bfloat16()
    top = torch.rand(TOKENS, EXPERTS, generator=generator, device="cuda").topk(TOPK, dim=1)
    matrix = torch.randn(1024, 1024, generator=generator, device="cuda")
    weight, side = torch.randn(HIDDEN, HIDDEN, generator=generator, device="cuda").bfloat16(), torch.cuda.Stream()

    def layer(start: bool, apart: bool = False) -> dict[str, torch.Tensor]:
        """apart: calls are started and finished on different streams, as in Megatron's 1F1B plan."""
        x, probs = inputs.clone().requires_grad_(), top.values.clone().requires_grad_()
        w, current = weight.clone().requires_grad_(), torch.cuda.current_stream()
        given = (x, top.indices, probs, EXPERTS, group)
        if start:
            side.wait_stream(current)
            with torch.cuda.stream(side if apart else current):
                dispatching = start_dispatch(*given, next_to_experts=not apart)
            assert dispatching is not None
            shared = x @ w  # next to it, and its backward next to the combine's
            if apart:
                current.wait_stream(side)
            rows, row_probs, _, handle = finish_dispatch(dispatching)
        else:
            rows, _, row_probs, _, handle = fused_dispatch(*given, do_expand=True)
            shared = x @ w
        products = (rows * row_probs[:, None]).bfloat16()
        if start:
            side.wait_stream(current)
            with torch.cuda.stream(side if apart else current):
                combining = start_combine(products, group, handle)
                assert combining is not None
            work = matrix @ matrix
            y = finish_combine(combining)
            assert work.isfinite().all()
        else:
            y, _ = fused_combine(products, group, handle)
        (y + shared).backward(torch.ones_like(y))
        assert x.grad is not None and probs.grad is not None and w.grad is not None
        return {"rows": rows.detach(), "y": y.detach(), "x": x.grad, "probs": probs.grad, "w": w.grad}

    say("with the wait, started, on other streams", group)
    wanted, found = layer(False), {}
    for name, apart in (("", False), (" apart", True)):
        for _ in range(3):  # memory of the first is used again
            results = layer(True, apart)
        found |= {f"{key}{name}": torch.equal(value, wanted[key]) for key, value in results.items()}
    say("a peer that comes late", group)
    torch.cuda.synchronize()
    if group.rank() == 0:
        torch.cuda._sleep(LATE)  # the others' counts come only after it
    pending = start_dispatch(inputs, top.indices, top.values, EXPERTS, group)
    assert pending is not None
    found["the host goes on"] = not torch.cuda.current_stream().query() or group.rank() != 0
    found["its rows"] = torch.equal(finish_dispatch(pending)[0], wanted["rows"])
    say("another call before the wait, from another stream", group)
    one, other = (start_dispatch(inputs, top.indices, top.values, EXPERTS, group) for _ in range(2))
    assert one is not None and other is not None
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        last, _, _, _, handle = fused_dispatch(inputs, top.indices, top.values, EXPERTS, group, do_expand=True)
    torch.cuda.current_stream().wait_stream(side)
    found["two in turn"] = all(torch.equal(finish_dispatch(each)[0], wanted["rows"]) for each in (one, other))
    combining = start_combine(last, group, handle)
    assert combining is not None
    fused_dispatch(inputs, top.indices, top.values, EXPERTS, group, do_expand=True)
    found["a combine"] = torch.equal(finish_combine(combining), fused_combine(last, group, handle)[0])
    pool.destroy_buffers()
    return found


@isolated
def weight_gradients(group: Any) -> dict[str, bool]:
    """A layer with grouped experts whose weight gradients run next to the dispatch's backward, added to `main_grad`."""
    chosen = {"buffer": v2_carrier(), "num_max_tokens_per_rank": TOKENS, "deterministic": True}
    settings.activate(settings.resolve(**chosen))
    generator = torch.Generator("cuda").manual_seed(group.rank())
    inputs = torch.randn(TOKENS, HIDDEN, generator=generator, device="cuda").bfloat16()
    top = torch.rand(TOKENS, EXPERTS, generator=generator, device="cuda").topk(TOPK, dim=1)
    local = EXPERTS // group.size()
    weights = [
        (torch.randn(shape, generator=generator, device="cuda") * 0.05).bfloat16()
        for shape in ((local, 2 * FFN, HIDDEN), (local, HIDDEN, FFN))
    ]

    def layer(start: bool) -> list[torch.Tensor]:
        x, probs = inputs.clone().requires_grad_(), top.values.clone().requires_grad_()
        given = (x, top.indices, probs, EXPERTS, group)
        if start:
            dispatching = start_dispatch(*given)
            assert dispatching is not None
            rows, row_probs, counts, handle = finish_dispatch(dispatching)
            assert rows.grad_fn is not None
            attach(counts, RowInfo(rows_node=rows.grad_fn._sequence_nr()))
        else:
            rows, _, row_probs, maybe_counts, handle = fused_dispatch(*given, do_expand=True)
            assert maybe_counts is not None
            counts = maybe_counts
        groups, parameters = Groups.from_counts(counts, rows), [torch.nn.Parameter(w.clone()) for w in weights]
        main_grads = [torch.ones(w.shape, device="cuda") for w in weights]
        h = linear(rows, parameters[0], groups, GEMMS["grouped"], False, None, main_grads[0])
        activated = WeightedSwiglu.apply(h, row_probs, groups.used)
        y, _ = fused_combine(linear(activated, parameters[1], groups, GEMMS["grouped"], True), group, handle)
        y.backward(torch.ones_like(y))
        assert x.grad is not None and probs.grad is not None and parameters[1].grad is not None
        return [y.detach(), x.grad, probs.grad, main_grads[0], parameters[1].grad]

    wanted = layer(False)
    found = [torch.equal(a, b) for a, b in zip(layer(True), wanted, strict=True)]
    pool.destroy_buffers()
    return dict(zip(("y", "x", "probs", "main_grad", "grad"), found, strict=True))


@pytest.mark.parametrize("what", [started, weight_gradients])
def test_started_calls_deliver_what_those_with_the_wait_do(what: Any) -> None:
    if not buffer_class(v2_carrier()).defers:
        pytest.skip(f"{v2_carrier()} cannot start a call: DeepEP 2.5 can")
    for found in run_ranks(RANKS, what, backend="nccl"):
        assert found == dict.fromkeys(found, True)
