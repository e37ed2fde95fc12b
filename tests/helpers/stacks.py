"""The two stacks of constraints.txt, on which CI runs the suite."""

from __future__ import annotations

from importlib import metadata

import pytest

from megatron_ep_v2 import versions

NEWEST = versions.MEGATRON_CORE.split(" to ")[1]

# For a test that takes long and whose fact depends on no version of Megatron or torch.
on_one_stack = pytest.mark.skipif(
    metadata.version("megatron-core") == NEWEST,
    reason=f"depends on no version: runs on the stack with an older megatron-core than {NEWEST}",
)
