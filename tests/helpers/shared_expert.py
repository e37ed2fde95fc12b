"""Megatron's shared expert next to communication, on a CPU."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

with_overlap = pytest.mark.skipif(
    "alltoall or flex token dispatcher" not in inspect.getsource(TransformerConfig),
    reason="this Megatron-Core has no shared expert next to the flex dispatcher (0.19 has)",
)


class NoStream:
    """The CPU's one stream is in order by itself."""

    def __init__(self, *_: Any, **__: Any):
        self.wait_stream = self.wait_event = self.record = lambda *_: None


@contextlib.contextmanager
def shared_expert_on_the_cpu() -> Iterator[None]:
    """What it needs of CUDA."""
    names = dict.fromkeys(("Stream", "current_stream", "Event"), NoStream)
    with mock.patch.multiple(torch.cuda, stream=lambda *_: contextlib.nullcontext(), **names):
        yield
