"""Decode in CUDA graphs: one for each bucket, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from megatron_ep_v2 import graphs
from megatron_ep_v2.serving.pair import Decode, PrepareFinalize


class DecodeGraphs:
    """A decode layer for each bucket, captured once in a CUDA graph and replayed. On the CPU it runs without graphs.
    They are dropped when buffers or process groups are destroyed (see `megatron_ep_v2.graphs`).

    Args:
        pair: Its `prepare_decode` and `finalize` are called around the experts.
        experts: Computes the rows for `finalize` from a `Decode`; must not wait for the device.
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
        self.drop()
        graphs.register(self)

    def drop(self) -> None:
        """Forget the graphs; what needs one captures it again."""
        self._by_bucket: dict[int, _Captured] = {}
        self._last: torch.cuda.CUDAGraph | None = None  # the graphs share memory, because they never run concurrently

    def capture(self, buckets: Iterable[int] | None = None) -> None:
        """Compile and capture; collective. buckets: In the same order on every rank; None = all, the largest first, so
        that the smaller ones reuse its memory."""
        for bucket in self.pair.buckets[::-1] if buckets is None else buckets:
            if bucket not in self._by_bucket:
                self._by_bucket[bucket] = self._capture(bucket)

    def __call__(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, *, bucket: int
    ) -> torch.Tensor:
        """Run the layer; captures the bucket first if needed. Arguments as for `prepare_decode`. Returns [T, H], which
        the next call overwrites, also one with another bucket: the graphs share memory.

        Raises:
            InputError: See `prepare_decode`.
        """
        self.pair.check_tokens(x, topk_idx, topk_weights, bucket)
        self.capture([bucket])
        captured, tokens = self._by_bucket[bucket], len(x)
        captured.x[:tokens].copy_(x)
        captured.topk_idx[:tokens].copy_(topk_idx)
        captured.topk_idx[tokens:].fill_(-1)  # rows without a selection are not sent
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
        warm_up = torch.cuda.Stream(device)
        warm_up.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(warm_up):  # the first call compiles and loads kernels, which cannot be captured
            self._layer(static, bucket)
        torch.cuda.current_stream(device).wait_stream(warm_up)
        static.graph = torch.cuda.CUDAGraph()
        # thread_local: other threads (NCCL's watchdog) may make CUDA calls that a capture forbids.
        memory = None if self._last is None else self._last.pool()
        with torch.cuda.graph(static.graph, pool=memory, capture_error_mode="thread_local"):
            static.y = self._layer(static, bucket)
        self._last = static.graph
        return static


@dataclass
class _Captured:
    """The inputs and the output of a graph, at fixed addresses."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    y: torch.Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None
