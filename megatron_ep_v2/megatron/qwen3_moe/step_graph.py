"""The CUDA graph of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_ep_v2 import graphs, sync_free
from megatron_ep_v2.errors import CaptureError


@dataclass(frozen=True)
class Capture:
    """What a capture took.

    Attributes:
        seconds: On the host.
        pool_bytes: Memory that the graph keeps for its tensors, in torch's allocator.
    """

    seconds: float
    pool_bytes: int


class StepGraph:
    """Runs a function of a step's micro-batches eagerly first, then captures it and replays the graph.

    It runs eagerly, and captures at the next call, where the graph would not fit: at the first call, if the shapes of
    the micro-batches or their number have changed, and if sync-free mode has other room for rows, as after an overflow.
    What is compiled or loaded at a first call cannot be captured. All calls are in one stream, and not the default one.
    The graph is dropped when buffers or process groups are destroyed (see `megatron_ep_v2.graphs`).

    Args:
        function: From micro-batches on the device to a tensor; must not wait for the device. It reads and writes the
            same memory at each call: parameters, gradients, counters.
        device: Of the graph.

    Attributes:
        captures: Of this graph so far, oldest first.
    """

    def __init__(self, function: Callable[[Sequence[torch.Tensor]], torch.Tensor], device: torch.device):
        self.function, self.device = function, device
        self.captures: list[Capture] = []
        self.drop()
        graphs.register(self)

    def drop(self) -> None:
        """Forget the graph: the next call runs eagerly."""
        self._fits: object = None  # what the last call has run with
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[torch.Tensor] = []
        self._result: torch.Tensor | None = None

    def run(self, micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """The function's result for micro-batches on the host. The next call overwrites it.

        Raises:
            CaptureError: The function waits for the device.
        """
        fits = [(tokens.shape, tokens.dtype) for tokens in micro_batches], sync_free.rooms()
        if fits != self._fits:
            self.drop()
            self._fits = fits
            return self.function([tokens.to(self.device, non_blocking=True) for tokens in micro_batches])
        if self._graph is None:
            self._graph = self._capture(micro_batches)
        for own, tokens in zip(self._inputs, micro_batches, strict=True):
            own.copy_(tokens, non_blocking=True)
        self._graph.replay()
        assert self._result is not None  # of the capture
        return self._result

    def _capture(self, micro_batches: Sequence[torch.Tensor]) -> torch.cuda.CUDAGraph:
        """Nothing runs on the device yet."""
        self._inputs = [torch.empty_like(tokens, device=self.device) for tokens in micro_batches]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph's memory comes from a pool of its own
        before, began = torch.cuda.memory_reserved(), time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may ask CUDA for what a capture forbids.
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._result = self.function(self._inputs)
        except Exception as error:
            raise CaptureError(
                "a training step cannot be captured in a CUDA graph",
                found=f"{type(error).__name__}: {error}",
                needed="a step in which nothing waits for the device or runs in another stream, in all its modules",
                fix="run without the graph; torch.cuda.set_sync_debug_mode('error') then names what waits",
            ) from error
        self.captures.append(Capture(time.perf_counter() - began, torch.cuda.memory_reserved() - before))
        return graph
