"""A MoE layer with and without a host wait (the bench's own), how far two results are apart, and a poisoned buffer."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ep_v2.bench.expert_layer import ExpertLayer as Layer
from megatron_ep_v2.bench.expert_layer import Sizes
from megatron_ep_v2.buffers import pool

__all__ = ["Layer", "Poisoned", "Sizes", "errors", "poison"]


def errors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative L2 distances; NaN where ours is."""
    return {
        name: float(
            (ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm().clamp(min=1e-30)
        )
        for name in theirs
    }


class Poisoned:
    """A buffer that writes NaN, and ids that look real, over everything past the received rows."""

    def __init__(self, buffer: Any):
        self.buffer = buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.buffer, name)

    def dispatch(self, x: Any, **arguments: Any) -> Any:
        rows, ids, weights, handle, event = self.buffer.dispatch(x, **arguments)
        received = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        if not handle.do_expand and received < len(rows):
            rows[received:] = float("nan")
            if ids is not None:
                local = handle.num_experts // self.buffer.group.size()
                ids[received:] = torch.arange(ids.shape[1], device=ids.device) % local
            if weights is not None:
                weights[received:] = float("nan")
        return rows, ids, weights, handle, event


def poison(group: Any) -> None:
    """From now on, for this group's buffer."""
    pool._pool[group] = Poisoned(pool._pool[group])
