"""Kernels that DeepEP has compiled: a benchmark must not time a compilation, and a soak must find none."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.generations import GENERATIONS
from megatron_ep_v2.probe import probe
from megatron_ep_v2.settings import shown_environment


def count_kernels() -> int:
    """Kernels in the cache of the DeepEP V2 that is here, whichever job compiled them: each has a folder of its own. 0
    where there is none."""
    carrier = probe().v2_carrier
    if carrier is None:
        return 0
    folders = GENERATIONS[str(CARRIERS[carrier].generation)].cache_folders(shown_environment(), Path.home())
    return sum(1 for folder in folders for _, _, files in os.walk(folder) if files)
