"""The top-k kernels on a GPU, and their gradient by autograd."""

from __future__ import annotations

import pytest
import torch

from megatron_ep_v2.kernels.topk import top_k
from tests.helpers.topk_kernels import wrong


def test_the_kernels_equal_a_stable_sort() -> None:
    from megatron_ep_v2.kernels import topk_triton

    assert wrong(topk_triton, "cuda") == []


def test_the_gradient_arrives_where_the_values_were_taken() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    probs = torch.rand(9000, 128, generator=generator, device="cuda").requires_grad_()
    weights = torch.rand(9000, 8, generator=generator, device="cuda")
    values, indices = top_k(probs, 8)
    assert values.grad_fn is not None and "_TopK" in type(values.grad_fn).__name__
    (values * weights).sum().backward()
    assert probs.grad is not None and probs.grad.equal(torch.zeros_like(probs).scatter(1, indices, weights))


@pytest.mark.parametrize("tokens", [9000, 9], ids=["kernels", "PyTorch's"])
def test_what_is_0_selects_nothing_and_the_host_does_not_wait(tokens: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    scores = torch.rand(tokens, 128, generator=generator, device="cuda")
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(8).indices, 1.0) * (scores > 0.96)  # fewer than 8 of most
    probs = (scores * chosen).requires_grad_()
    weights = torch.rand(tokens, 8, generator=generator, device="cuda")
    for _ in range(2):  # the first compiles
        probs.grad = None
        torch.cuda.set_sync_debug_mode("error")
        try:
            values, indices = top_k(probs, 8)
            # As dispatch, which has no gradient for what was not selected; the kernels would not read one.
            (values * (weights if tokens == 9000 else weights * (indices >= 0))).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert (indices < 0).equal(values == 0) and (indices >= 0).sum() == chosen.sum() < chosen.shape[0] * 8
    rows, columns = (indices >= 0).nonzero(as_tuple=True)
    wanted = torch.zeros_like(probs)
    wanted[rows, indices[rows, columns]] = weights[rows, columns]
    assert probs.grad is not None and probs.grad.equal(wanted)
    assert probs[rows, indices[rows, columns]].equal(values[rows, columns])
