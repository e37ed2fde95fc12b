"""Decode in CUDA graphs: one for each bucket, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ep_v2.serving.pair import Decode, PrepareFinalize


class DecodeGraphs:
    """A decode layer for each bucket, captured once in a CUDA graph and replayed. On the CPU it just runs.

    Args:
        pair: Its `prepare_decode` and `finalize` go around the experts.
        experts: What `finalize` wants from a `Decode`; nothing in it may wait for the device.
        device: Of the rows.
        slot: As in `PrepareFinalize`.
    """

    def __init__(
        self,
        pair: PrepareFinalize,
        experts: Callable[[Decode], torch.Tensor],
        device: torch.device | str,
        slot: int = 0,
    ):
        self.pair, self.experts, self.slot, self.device = pair, experts, slot, torch.device(device)
        self._by_bucket: dict[int, _Captured] = {}
        self._memory = None  # shared by the graphs, which never run at the same time

    def capture(self, buckets: Iterable[int] | None = None) -> None:
        """Compile and capture; collective. buckets: in the same order on every rank; None = all, the largest first, so
        that the smaller ones find memory enough."""
        for bucket in self.pair.buckets[::-1] if buckets is None else buckets:
            if bucket not in self._by_bucket:
                self._by_bucket[bucket] = self._capture(bucket)

    def __call__(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, *, bucket: int
    ) -> torch.Tensor:
        """Arguments as for `prepare_decode`; a bucket that was not captured is, now. Returns [T, H], which the next
        call with this bucket overwrites.

        Raises:
            InputError: What `prepare_decode` refuses.
        """
        self.pair.check_tokens(x, topk_idx, topk_weights, bucket)
        self.capture([bucket])
        captured, tokens = self._by_bucket[bucket], len(x)
        captured.x[:tokens].copy_(x)
        captured.topk_idx[:tokens].copy_(topk_idx)
        captured.topk_idx[tokens:].fill_(-1)  # rows without a pick go nowhere
        captured.topk_weights[:tokens].copy_(topk_weights)
        if captured.graph is None:
            captured.y = self._layer(captured, bucket)
        else:
            captured.graph.replay()
        assert captured.y is not None
        return captured.y[:tokens]

    def _layer(self, static: _Captured, bucket: int) -> torch.Tensor:
        rows = self.pair.prepare_decode(static.x, static.topk_idx, static.topk_weights, bucket=bucket, slot=self.slot)
        return self.pair.finalize(self.experts(rows), slot=self.slot)

    def _capture(self, bucket: int) -> _Captured:
        pair, device = self.pair, self.device
        static = _Captured(
            x=torch.zeros(bucket, pair.hidden, dtype=pair.dtype, device=device),
            topk_idx=torch.full((bucket, pair.num_topk), -1, device=device),
            topk_weights=torch.zeros(bucket, pair.num_topk, device=device),
        )
        if device.type != "cuda":
            return static
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):  # what is compiled or loaded at a first call cannot be captured
            self._layer(static, bucket)
        torch.cuda.current_stream(device).wait_stream(beside)
        static.graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may ask CUDA for what a capture forbids; that is theirs, and no fault of ours.
        with torch.cuda.graph(static.graph, pool=self._memory, capture_error_mode="thread_local"):
            static.y = self._layer(static, bucket)
        self._memory = static.graph.pool()
        return static


@dataclass
class _Captured:
    """The inputs and the output of a graph; they stay where they are."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    y: torch.Tensor | None = None
    graph: Any = None
