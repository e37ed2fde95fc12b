"""What other streams run during a watched call where all streams share one hardware queue.

There, a kernel that waits for the communication holds back all that is queued after it, on any stream, and so does a
write to memory. So neither may be queued between a call and what is to run next to it: this is the test of the
watchdog's mark (`watchdog.completion.GpuClock`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.bench.exposed import activity
from megatron_ep_v2.fused_a2a import get_buffer
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.watchdog.watched_buffer import WatchedBuffer
from tests.helpers.carriers import v2_carrier
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.shapes import GPU

RANKS = gpu_ranks()
AHEAD_CYCLES = 4_000_000  # about 2 ms: until all is queued, on every rank


@isolated
def compute_during_calls(group: Any) -> dict[str, float]:
    """Call -> the part of its kernels' time in which a GEMM ran that was queued after it, on a stream of its own."""
    settings.activate(settings.resolve(buffer=v2_carrier(), watchdog_secs=30, num_max_tokens_per_rank=GPU.tokens))
    x = torch.randn(GPU.tokens, GPU.hidden, device="cuda").bfloat16()
    top = torch.rand(GPU.tokens, GPU.experts, device="cuda").topk(GPU.topk, dim=1)
    weight = torch.randn(GPU.hidden, 4 * GPU.hidden, device="cuda").bfloat16()
    buffer = get_buffer(group, x, top.indices, GPU.experts)
    assert isinstance(buffer, WatchedBuffer)
    rows, _, _, handle, _ = buffer.dispatch(
        x, topk_idx=top.indices, topk_weights=top.values, num_experts=GPU.experts, do_expand=True
    )
    other = torch.cuda.Stream()

    def run(call: Callable[[], Any]) -> None:
        torch.distributed.barrier()
        torch.cuda._sleep(AHEAD_CYCLES)
        other.wait_stream(torch.cuda.current_stream())
        call()
        with torch.cuda.stream(other):
            x @ weight
        torch.cuda.current_stream().wait_stream(other)

    calls: dict[str, Callable[[], Any]] = {
        "cached dispatch": lambda: buffer.dispatch(x, handle=handle, num_sms=handle.num_sms, do_expand=True),
        "combine": lambda: buffer.combine(rows, handle),
    }
    found = {}
    for name, call in calls.items():
        run(call)  # compiled, and cuBLAS has its workspace on that stream
        ran = activity(lambda call=call: run(call))  # type: ignore[misc]
        found[name] = 1 - ran.exposed / ran.communication
    return found


def test_compute_runs_during_watched_calls_in_one_hardware_queue() -> None:
    everywhere = run_ranks(
        RANKS,
        compute_during_calls,
        backend="nccl",
        env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        fresh=True,
    )
    print(everywhere)
    for rank, found in enumerate(everywhere):  # 0 where it had to wait; how much more says how busy the GPU is
        assert all(covered > 0.005 for covered in found.values()), f"rank {rank}: {found}"
