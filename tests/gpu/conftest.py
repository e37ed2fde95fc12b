"""GPU tests: marked `gpu`, skipped with the reason where they cannot run. `pytest -m gpu -s tests/gpu` runs them, on
the carrier of DeepEP V2 that is installed.

deep_ep compiles a kernel for each new shape in 2.5 s, on all ranks at once, so the tests share their shapes. R ranks:

| shape | hidden | top-k | experts | capacity | kernels | tests |
|---|---|---|---|---|---|---|
| small | 512 | 4 | 4 R | 128 | 17 | buffers, fused, fp8, layouts, lifecycle, stalls (R = 4) |
| small, 8 bits | 512 | 4 | 4 R | 128 | 10 | fp8, buffers: 4 words of scales, whether fp32 or mxfp8 |
| small, another R | 512 | 4 | 4 R | 128 | 15 each | buffers on 4 and 2 of 8 GPUs, on 2 of 4 |
| other scales | 1024 | 4 | 4 R | 128 | 14 | buffers: UE8M0 for 128 columns |
| small, replica slots | 512 | 4 | (4 + slots) R | 128 | 10 each | redundant: 1 and 2 slots |
| large batch | 512 | 8 | 8 R | 128 | 14 | buffers |
| real | 2048 | 8 | 128 | 4096 | 11 | moe_layer, overlap, recompute, sync_free, deterministic |
| decode | 2048 | 8 | 128 | the bucket | 4 each | decode |

A kernel is compiled for one layout, alignment, dtype, for a first or a cached dispatch, with or without a host wait:
so the numbers (read in deep_ep 2.1.0's csrc/kernels/elastic; 2.5 has the same kernels). On 4 GPUs 97, so four minutes;
EP_JIT_CACHE_DIR keeps them.
The rank processes stay warm over all files (importing Megatron and TransformerEngine takes 15 to 20 s); what has to end
them comes last.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.probe import probe

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
    items.sort(key=lambda item: item.path == HERE / "test_stalls.py")  # its ranks do not survive


@pytest.fixture(scope="session", autouse=True)
def _gpus_and_deep_ep() -> None:
    """Looked for when the first test runs, and not when tests are collected: a run on the CPU pays nothing for it."""
    if gpu_ranks() < 2:
        pytest.skip(f"needs at least 2 GPUs, or NCCL_MULTI_RANK_GPU_ENABLE=1; found {torch.cuda.device_count()} GPUs")
    if not probe().have_deep_ep_v2:
        wanted = [carrier.requirement for carrier in CARRIERS.values() if carrier.is_v2]
        pytest.skip(f"needs {' or '.join(wanted)}; {probe().describe()}")
    # torch's deterministic mode wants it, and looks once in a process: at the first matrix product of any test.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def transformer_engine() -> None:
    """Megatron's layers on GPUs are built of it. Not imported here: that takes its time in each rank already."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs TransformerEngine: Megatron's layers on GPUs are built of it")
