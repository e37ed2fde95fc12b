"""Environment of a rank while it measures: process group, device, and Megatron as in training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2.bench import ranks
from megatron_ep_v2.settings import Launch


@contextlib.contextmanager
def session(job: Launch) -> Iterator[torch.device]:
    """Join the other ranks; yields this rank's device.

    Raises:
        SettingsError: Fewer GPUs than ranks on this host.
    """
    warnings.filterwarnings("ignore")  # at import, Megatron warns on every rank of missing optional packages
    device = ranks.join(job)
    try:
        from megatron_ep_v2.megatron.standalone import on_cpu

        with on_cpu() if device.type == "cpu" else _compiled_as_in_training():
            yield device
    finally:
        megatron_ep_v2.destroy_buffers()
        dist.destroy_process_group()


@contextlib.contextmanager
def _compiled_as_in_training() -> Iterator[None]:
    """Raise torch's limit of recompilations: Megatron compiles small functions, here once for each dispatcher. Past the
    limit the last dispatchers of the table would run uncompiled, an unfair comparison."""
    torch._dynamo.config.recompile_limit = 128
    yield
