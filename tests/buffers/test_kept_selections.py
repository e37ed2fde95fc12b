"""A buffer whose handle keeps the caller's selections, as DeepEP 2.5's does: what callers may do with their own tensor.

The handle here asserts what DeepEP's asserts: that nothing has written to the tensor since the dispatch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_ep_v2.buffers.reference import ReferenceBuffer, ReferenceHandle
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.serving import PrepareFinalize
from tests.helpers.harness import isolated, run_ranks

SELECTED = torch.tensor([[0, 3], [2, 1], [1, -1], [3, 2], [0, 2]])  # 2 and 3 are on the second rank
NUM_EXPERTS = 4


class KeepingHandle(ReferenceHandle):
    """Its `topk_idx` is the tensor of the dispatch; reading it raises once it has been written to."""

    def __getattribute__(self, name: str) -> Any:
        if name == "topk_idx" and "kept" in vars(self):
            kept, version = vars(self)["kept"]
            assert kept._version == version, "`topk_idx` must not be modified while the handle is in use"
            return kept
        return super().__getattribute__(name)


@contextmanager
def keeping() -> Iterator[None]:
    dispatch, combine = ReferenceBuffer.dispatch, ReferenceBuffer.combine

    def kept_dispatch(self: Any, x: torch.Tensor, **arguments: Any) -> Any:
        handle = arguments.get("handle")
        if handle is not None:
            assert handle.topk_idx is not None
        answer = dispatch(self, x, **arguments)
        if handle is None:
            selected = arguments["topk_idx"]
            vars(answer[3])["kept"] = selected, selected._version
            object.__setattr__(answer[3], "__class__", KeepingHandle)
        return answer

    def kept_combine(self: Any, x: Any, handle: Any, *more: Any, **arguments: Any) -> Any:
        assert handle.topk_idx is not None
        return combine(self, x, handle, *more, **arguments)

    with (
        mock.patch.object(ReferenceBuffer, "dispatch", kept_dispatch),
        mock.patch.object(ReferenceBuffer, "combine", kept_combine),
        mock.patch.object(ReferenceBuffer, "keeps_topk_idx", True),
    ):
        yield


def gradients(group: Any, overwritten: bool, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of y = sum over the selections of p x, with a loss whose gradient differs in every element."""
    generator = torch.Generator().manual_seed(group.rank())
    x = torch.randn(5, 16, dtype=torch.float64, generator=generator).requires_grad_()
    probs = torch.rand(5, 2, dtype=torch.float64, generator=generator).requires_grad_()
    indices = SELECTED.clone()
    rows, _, row_probs, _, handle = fused_dispatch(x, indices, probs, NUM_EXPERTS, group, do_expand=True, **arguments)
    if overwritten:
        indices.fill_(0)
    y, _ = fused_combine(rows * row_probs[:, None], group, handle)
    y.backward(torch.arange(80, dtype=torch.float64).view(5, 16))
    assert x.grad is not None and probs.grad is not None
    return x.grad, probs.grad


@isolated
def train(group: Any, overwritten: bool, **arguments: Any) -> Any:
    with keeping():
        return gradients(group, overwritten, **arguments)


def test_a_caller_may_overwrite_its_indices_after_the_dispatch() -> None:
    for kept, overwritten in zip(run_ranks(2, train, False), run_ranks(2, train, True), strict=True):
        torch.testing.assert_close(overwritten, kept, rtol=0, atol=0)


@isolated
def train_without_a_copy(group: Any) -> str:
    with keeping(), pytest.raises(AssertionError, match="must not be modified") as caught:
        gradients(group, True, keep_indices=True)
    return str(caught.value)


def test_a_caller_that_promises_not_to_is_given_no_copy() -> None:
    assert all("topk_idx" in said for said in run_ranks(2, train_without_a_copy))


@isolated
def serve(group: Any, decode: bool) -> list[float]:
    """Each token's row is its number + 1, and comes back once for each selection, or in a decode for each rank."""
    sizes = {"hidden": 16, "num_topk": 2, "num_experts": NUM_EXPERTS, "max_prefill_tokens": 8, "max_decode_tokens": 8}
    with keeping():
        pair = PrepareFinalize(group, **sizes, dtype=torch.float64)
        x = torch.arange(1.0, 6.0, dtype=torch.float64)[:, None].repeat(1, 16)
        indices, weights = SELECTED.clone(), torch.ones(5, 2)
        prepare = functools.partial(pair.prepare_decode, bucket=8) if decode else pair.prepare_prefill
        work = prepare(x, indices, weights)
        indices.fill_(-1)  # the next batch's
        combined: list[float] = pair.finalize(work.rows)[:, 0].tolist()
        return combined


@pytest.mark.parametrize(("decode", "expected"), [(False, [2, 4, 3, 8, 10]), (True, [2, 4, 3, 4, 10])])
def test_a_server_may_overwrite_its_indices_before_finalize(decode: bool, expected: list[float]) -> None:
    assert run_ranks(2, serve, decode) == [expected, expected]
