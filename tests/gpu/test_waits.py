"""The control of every test that finds no host wait: one that is there is found, and what does not wait has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.gpu.waits import traced
from tests.helpers.harness import run_ranks


def known_waits(group: Any) -> dict[str, tuple[dict[str, int], int]]:
    """Piece of work -> the waits that were found in it, and how many kernels and copies."""
    x = torch.ones(1 << 20, device="cuda")

    def record_and_wait() -> None:
        event = torch.cuda.Event()
        event.record()
        event.synchronize()

    works: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "kernels": lambda: x.mul(2).sum(),
        "item": lambda: x.sum().item(),
        "nonzero": lambda: x.nonzero(),
        "copy to the host": lambda: x.cpu(),
        "device": torch.cuda.synchronize,
        "event": record_and_wait,
    }
    for work in works.values():
        work()
    found = {name: traced(work) for name, work in works.items()}
    return {name: (trace.waits, trace.kernels.total()) for name, trace in found.items()}


def test_known_waits_are_found_and_no_others() -> None:
    (found,) = run_ranks(1, known_waits, backend="nccl")
    print(found)
    waits = {name: waits for name, (waits, _) in found.items()}
    assert waits["nothing"] == waits["kernels"] == {} and found["kernels"][1] >= 2
    assert waits["device"] == {"cudaDeviceSynchronize": 1} and waits["event"] == {"cudaEventSynchronize": 1}
    for name in ("item", "nonzero", "copy to the host"):
        assert waits[name], f"{name}: no wait was found"
