"""What other streams run beside a watched call where all streams share one hardware queue.

There, a kernel that waits for the communication holds back all that is queued behind it, on any stream, and so does a
write to memory. So neither may be queued between a call and what is to run beside it: this is the test of the
watchdog's mark (`watchdog.completion.GpuClock`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.bench.exposed import profiled
from megatron_ep_v2.fused_a2a import get_buffer
from megatron_ep_v2.watchdog.watched_buffer import WatchedBuffer
from tests.helpers.harness import run_ranks
from tests.helpers.moe import own_package

RANKS = torch.cuda.device_count()
TOKENS, HIDDEN, EXPERTS, TOPK = 4096, 2048, 128, 8
AHEAD_CYCLES = 4_000_000  # about 2 ms: until all is queued, on every rank


@own_package
def compute_beside_calls(group: Any) -> dict[str, float]:
    """Call -> the part of its kernels' time in which a GEMM ran that was queued behind it, on a stream of its own."""
    settings.activate(settings.resolve(buffer="elastic", watchdog_secs=30, num_max_tokens_per_rank=TOKENS))
    x = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    top = torch.rand(TOKENS, EXPERTS, device="cuda").topk(TOPK, dim=1)
    weight = torch.randn(HIDDEN, 4 * HIDDEN, device="cuda").bfloat16()
    buffer = get_buffer(group, x, top.indices, EXPERTS)
    assert isinstance(buffer, WatchedBuffer)
    rows, _, _, handle, _ = buffer.dispatch(
        x, topk_idx=top.indices, topk_weights=top.values, num_experts=EXPERTS, do_expand=True
    )
    beside = torch.cuda.Stream()

    def run(call: Callable[[], Any]) -> None:
        torch.distributed.barrier()
        torch.cuda._sleep(AHEAD_CYCLES)
        beside.wait_stream(torch.cuda.current_stream())
        call()
        with torch.cuda.stream(beside):
            x @ weight
        torch.cuda.current_stream().wait_stream(beside)

    calls: dict[str, Callable[[], Any]] = {
        "cached dispatch": lambda: buffer.dispatch(x, handle=handle, num_sms=handle.num_sms, do_expand=True),
        "combine": lambda: buffer.combine(rows, handle),
    }
    found = {}
    for name, call in calls.items():
        run(call)  # compiled, and cuBLAS has its workspace on that stream
        share = profiled(lambda call=call: run(call))  # type: ignore[misc]
        found[name] = 1 - share.exposed / share.communication
    return found


def test_compute_runs_beside_watched_calls_in_one_hardware_queue() -> None:
    everywhere = run_ranks(
        RANKS,
        compute_beside_calls,
        backend="nccl",
        env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        fresh=True,
    )
    print(everywhere)
    for rank, found in enumerate(everywhere):
        assert all(covered > 0.05 for covered in found.values()), f"rank {rank}: {found}"
