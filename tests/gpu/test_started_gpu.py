"""Dispatches that are started, on DeepEP's own buffers: the bits of one with the wait, while the host goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.fused_a2a import finish_dispatch, fused_combine, fused_dispatch, start_dispatch
from megatron_ep_v2.gpus import gpu_ranks
from tests.helpers.carriers import buffer_class, v2_carrier
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.progress import say

RANKS = gpu_ranks()
TOKENS, HIDDEN, EXPERTS, TOPK = 128, 512, 4 * max(RANKS, 2), 4
LATE = 2_000_000_000  # cycles, about a second


@isolated
def started(group: Any) -> dict[str, Any]:
    chosen = {"buffer": v2_carrier(), "num_max_tokens_per_rank": TOKENS, "deterministic": True}
    settings.activate(settings.resolve(**chosen))
    generator = torch.Generator("cuda").manual_seed(group.rank())
    inputs = torch.randn(TOKENS, HIDDEN, generator=generator, device="cuda").bfloat16()
    top = torch.rand(TOKENS, EXPERTS, generator=generator, device="cuda").topk(TOPK, dim=1)
    matrix = torch.randn(1024, 1024, generator=generator, device="cuda")

    def layer(start: bool) -> dict[str, torch.Tensor]:
        x, probs = inputs.clone().requires_grad_(), top.values.clone().requires_grad_()
        given = (x, top.indices, probs, EXPERTS, group)
        if start:
            pending = start_dispatch(*given)
            assert pending is not None
            work = matrix @ matrix  # next to it
            rows, row_probs, _, handle = finish_dispatch(pending)
            assert work.isfinite().all()
        else:
            rows, _, row_probs, _, handle = fused_dispatch(*given, do_expand=True)
        y, _ = fused_combine((rows * row_probs[:, None]).bfloat16(), group, handle)
        y.backward(torch.ones_like(y))
        assert x.grad is not None and probs.grad is not None
        return {"rows": rows.detach(), "y": y.detach(), "x": x.grad, "probs": probs.grad}

    say("with the wait, started", group)
    wanted = layer(False)
    found = {name: torch.equal(value, wanted[name]) for name, value in layer(True).items()}
    say("a peer that comes late", group)
    torch.cuda.synchronize()
    if group.rank() == 0:
        torch.cuda._sleep(LATE)  # the others' counts come only after it
    pending = start_dispatch(inputs, top.indices, top.values, EXPERTS, group)
    assert pending is not None
    found["the host goes on"] = not torch.cuda.current_stream().query() or group.rank() != 0
    found["its rows"] = torch.equal(finish_dispatch(pending)[0], wanted["rows"])
    say("another dispatch before the wait", group)
    one, other = (start_dispatch(inputs, top.indices, top.values, EXPERTS, group) for _ in range(2))
    assert one is not None and other is not None
    found["two in turn"] = all(torch.equal(finish_dispatch(each)[0], wanted["rows"]) for each in (one, other))
    pool.destroy_buffers()
    return found


def test_a_started_dispatch_delivers_what_one_with_the_wait_does() -> None:
    if not buffer_class(v2_carrier()).defers:
        pytest.skip(f"{v2_carrier()} cannot start a dispatch: DeepEP 2.5 can")
    for found in run_ranks(RANKS, started, backend="nccl"):
        assert found == dict.fromkeys(found, True)
