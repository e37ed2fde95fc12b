"""Memory that several CUDA streams use.

torch's allocator hands memory out again in the order of the stream that it was allocated on. Another stream that reads
it, too, has to be recorded, or what it reads may be overwritten before it has run.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def record(tensors: Iterable[torch.Tensor | None], stream: torch.cuda.Stream | None = None) -> None:
    """Do not reuse the memory of tensors before a stream has run what it has been given when they are freed.

    Args:
        tensors: Of any device; only those on GPUs matter.
        stream: None = the current one.
    """
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream() if stream is None else stream)
