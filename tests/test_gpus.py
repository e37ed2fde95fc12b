"""Which GPU a rank takes, with GPUs that are only counted."""

from __future__ import annotations

import pytest
import torch

from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.gpus import gpu_of, gpu_ranks


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("gpus", "alone", "shared"), [(0, 0, 0), (1, 1, 2), (2, 2, 2), (8, 8, 8)], indirect=["gpus"])
def test_how_many_ranks_gpus_hold(gpus: int, alone: int, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_ranks() == alone
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert gpu_ranks() == shared
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "0")
    assert gpu_ranks() == alone


@pytest.mark.parametrize("gpus", [2], indirect=True)
def test_ranks_share_gpus_in_turn(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [gpu_of(rank, 2).index for rank in range(2)] == [0, 1]
    with pytest.raises(SettingsError, match="2 for 4 ranks") as raised:
        gpu_of(0, 4)
    assert "NCCL_MULTI_RANK_GPU_ENABLE=1" in str(raised.value)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert [gpu_of(rank, 4).index for rank in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("gpus", [0], indirect=True)
def test_without_gpus_sharing_helps_nothing(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    with pytest.raises(SettingsError, match="0 for 2 ranks") as raised:
        gpu_of(0, 2)
    assert "NCCL_MULTI" not in str(raised.value)
