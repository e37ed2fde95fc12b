"""What Megatron-Core's allgather and alltoall dispatchers need substituted on a machine without CUDA.

They ask torch.cuda where their collectives should write (the answer here is: on the CPU), and alltoall copies its
counts to the host on a CUDA stream (here they are there already).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def substitutions() -> Iterator[None]:
    """In force inside the block."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    places: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", "none"),  # not None: the constructor then makes no stream
        (MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", _splits_as_lists),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        with torch.compiler.set_stance("force_eager"):  # Megatron compiles small functions; that needs a C++ compiler
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _splits_as_lists(self: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
    if point == self.cuda_dtoh_point:
        self.input_splits, self.output_splits, self.output_splits_tp = (
            None if splits is None else splits.tolist()
            for splits in (self.input_splits, self.output_splits, self.output_splits_tp)
        )
    return tokens_per_expert
