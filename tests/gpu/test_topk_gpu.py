"""The top-k kernels on a GPU, and their gradient by autograd."""

from __future__ import annotations

import torch
from topk_oracle import wrong

from megatron_ep_v2.kernels.topk import top_k


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
