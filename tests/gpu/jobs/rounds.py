"""Job: rounds of create, train a step, destroy. Arguments: the carrier, the number of rounds, and what goes wrong.

never     nothing
step      each round breaks off between dispatch and combine, on all ranks, and the next one starts
rank      rank 1 raises in its second round
capacity  rank 1 brings too many tokens in its second round
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.gpus import gpu_of

# The small shape of conftest.py, so that its kernels are compiled already.
HIDDEN, LOCAL_EXPERTS, TOPK, TOKENS = 512, 4, 4, 128


class BrokenOffError(Exception):
    """What goes wrong in a step."""


def train_step(fail: str, round_number: int) -> None:
    num_tokens = 2 * TOKENS if fail == "capacity" and round_number == 1 and dist.get_rank() == 1 else TOKENS
    experts = LOCAL_EXPERTS * dist.get_world_size()
    x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    top = torch.rand(num_tokens, experts, device="cuda").topk(TOPK, dim=1)
    probs = top.values.contiguous().requires_grad_()
    rows, _, row_probs, _, handle = fused_dispatch(
        x, top.indices, probs, experts, dist.group.WORLD, True, True, do_expand=True
    )
    if fail == "step" or (fail == "rank" and round_number == 1 and dist.get_rank() == 1):
        raise BrokenOffError(f"round {round_number}")
    y, _ = fused_combine((rows * row_probs[:, None]).bfloat16(), dist.group.WORLD, handle, True, True)
    y.float().sum().backward()
    assert bool(torch.isfinite(x.grad).all()) and bool(torch.isfinite(probs.grad).all())


def main(carrier: str, rounds: int, fail: str) -> None:
    torch.cuda.set_device(gpu_of(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])))
    if fail == "never":
        megatron_ep_v2.install(buffer=carrier, num_max_tokens_per_rank=TOKENS)
    else:  # the same without importing Megatron, which takes its time
        settings.activate(settings.resolve(buffer=carrier, num_max_tokens_per_rank=TOKENS))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    for number in range(rounds):
        try:
            train_step(fail, number)
        except BrokenOffError:
            if fail == "rank":
                raise
        if fail != "never" or number < rounds - 1:  # install() has the last one destroyed with its group
            megatron_ep_v2.destroy_buffers()
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        print(f"{rounds} rounds done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
