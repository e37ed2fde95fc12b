"""The reference buffer as deep_ep is: each first dispatch delivers its rows in an order of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from megatron_ep_v2.buffers.reference import ReferenceBuffer


@contextmanager
def shuffled() -> Iterator[None]:
    """Rows of one expert (expanded, without padding) or all rows (compact) are permuted; cached dispatches repeat their
    handle's order, and combines undo it."""
    dispatch, combine = ReferenceBuffer.dispatch, ReferenceBuffer.combine
    generator = torch.Generator().manual_seed(7)  # not torch's own, whose state a checkpoint restores

    def order_of(handle: Any, num_rows: int) -> torch.Tensor:
        sizes = [int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])]
        if handle.do_expand:
            sizes = handle.num_recv_tokens_per_expert_list
        sizes = [*sizes, *[1] * (num_rows - sum(sizes))]
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        return torch.cat(
            [start + torch.randperm(size, generator=generator) for start, size in zip(starts, sizes, strict=False)]
        )

    def shuffled_dispatch(self: Any, x: torch.Tensor, **arguments: Any) -> Any:
        rows, idx, weights, handle, event = dispatch(self, x, **arguments)
        assert isinstance(rows, torch.Tensor)
        if arguments.get("handle") is None:
            vars(handle)["order"] = order_of(handle, len(rows))
        order = vars(handle)["order"]
        in_order = [None if each is None else each[order] for each in (idx, weights)]
        return rows[order], *in_order, handle, event

    def shuffled_combine(self: Any, x: Any, handle: Any, topk_weights: Any = None, **arguments: Any) -> Any:
        back = vars(handle)["order"].argsort()
        weights = None if topk_weights is None else topk_weights[back]
        return combine(self, x[back], handle, weights, **arguments)

    with (
        mock.patch.object(ReferenceBuffer, "dispatch", shuffled_dispatch),
        mock.patch.object(ReferenceBuffer, "combine", shuffled_combine),
    ):
        yield
