"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# A buffer's watcher takes some 40 ms of CPU time on each rank; the tests that are about it turn it on.
os.environ.setdefault("MCORE_DEEPEP_V2_WATCHDOG_SECS", "0")
# Oracles in fp64 and small hidden sizes; the tests of what the reference refuses by default turn it on.
os.environ.setdefault("MCORE_DEEPEP_V2_REFERENCE_STRICT", "off")
pytest.register_assert_rewrite(
    *(f"tests.helpers.{name}" for name in ("compare", "conformance", "expert_rows", "fused_layer", "reports"))
)


@pytest.fixture(scope="session", autouse=True)
def _warm_ranks() -> Iterator[None]:
    """The rank processes live as long as the test session."""
    # Not above: the process that hands out the tests, which the workers wait for, needs no torch.
    import torch

    from tests.helpers.harness import close_shared_pool

    torch.set_num_threads(1)
    yield
    close_shared_pool()
