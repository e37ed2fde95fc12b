"""Megatron's shared expert next to communication, on a CPU."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from unittest import mock

import pytest
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.helpers.stream_memory import Stream, streams_on_the_cpu

with_overlap = pytest.mark.skipif(
    "alltoall or flex token dispatcher" not in inspect.getsource(TransformerConfig),
    reason="this Megatron-Core has no shared expert next to the flex dispatcher (0.19 has)",
)


@contextlib.contextmanager
def shared_expert_on_the_cpu() -> Iterator[None]:
    """What it needs of CUDA."""
    with streams_on_the_cpu(), mock.patch.object(SharedExpertMLP, "stream", Stream(name="shared")):
        yield
