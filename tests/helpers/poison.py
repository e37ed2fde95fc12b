"""A buffer whose rows after the received ones are poison."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ep_v2.buffers import pool


class Poisoned:
    """A buffer that writes NaN, and ids that look real, over everything past the received rows, also in a replay."""

    def __init__(self, buffer: Any):
        self.buffer = buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.buffer, name)

    def dispatch(self, x: Any, **arguments: Any) -> Any:
        rows, ids, weights, handle, event = self.buffer.dispatch(x, **arguments)
        if not handle.do_expand:
            past = torch.arange(len(rows), device=rows.device) >= handle.psum_num_recv_tokens_per_scaleup_rank[-1]
            rows.masked_fill_(past[:, None], float("nan"))
            if ids is not None:
                ids.masked_fill_(past[:, None], 0)
            if weights is not None:
                weights.masked_fill_(past[:, None], float("nan"))
        return rows, ids, weights, handle, event


def poison_tails(group: Any) -> None:
    """From now on, for this group's buffer."""
    pool._pool[group] = Poisoned(pool._pool[group])
