"""A rank's surroundings while it measures: process group, device, and Megatron as it runs in training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from megatron_ep_v2.bench import ranks
from megatron_ep_v2.settings import Launch


@contextlib.contextmanager
def session(place: Launch) -> Iterator[torch.device]:
    """Join the other ranks; this rank's device.

    Raises:
        SettingsError: Fewer GPUs than ranks on this host.
    """
    warnings.filterwarnings("ignore")  # Megatron says at import, on every rank, what optional packages it misses
    with ranks.joined(place) as device:
        from megatron_ep_v2.megatron.standalone import on_cpu

        with on_cpu() if device.type == "cpu" else _compiled_as_in_training():
            yield device


@contextlib.contextmanager
def _compiled_as_in_training() -> Iterator[None]:
    """Megatron compiles small functions, here once for each dispatcher. Past torch's limit the last ones in the table
    would be left uncompiled, and compared unfairly."""
    torch._dynamo.config.recompile_limit = 128
    yield
