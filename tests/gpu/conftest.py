"""GPU tests: marked `gpu`, skipped with the reason where they cannot run. `pytest -m gpu tests/gpu` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ep_v2.probe import probe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = probe()
    reason = None
    if torch.cuda.device_count() < 2:
        reason = f"needs at least 2 CUDA devices, found {torch.cuda.device_count()}"
    elif not found.have_elastic:
        reason = f"needs deep_ep with ElasticBuffer; {found.describe()}"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
