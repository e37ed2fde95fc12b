"""Soak: many MoE layers through Megatron's flex dispatcher with batch sizes that change every step, ranks with fewer
tokens and with none. Memory and the number of compiled kernels must stay where the warm-up left them.

    torchrun --nproc-per-node 8 benchmarks/gpu_soak.py [--out benchmarks/results/h200x8/soak.jsonl]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import environment, make_flex_dispatcher, write_rows

import megatron_ep_v2

HIDDEN, EXPERTS, TOPK, MOST_TOKENS = 2048, 128, 8, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--every", type=int, default=50, help="steps between readings")
    parser.add_argument("--layout", choices=("compact", "expanded"), default="expanded")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    megatron_ep_v2.install(buffer="elastic", layout=options.layout, num_max_tokens_per_rank=MOST_TOKENS)
    dispatcher = make_flex_dispatcher(hidden=HIDDEN, experts=EXPERTS, topk=TOPK)

    sizes = torch.Generator().manual_seed(dist.get_rank())
    rows = []
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        # The first step is full on every rank; then one rank in eight is empty and the others are anything.
        empty = step > 1 and int(torch.randint(8, (), generator=sizes)) == 0
        tokens = 0 if empty else int(torch.randint(1, MOST_TOKENS + 1, (), generator=sizes))
        _layer(dispatcher, MOST_TOKENS if step == 1 else tokens, step)
        if step % options.every == 0:
            rows.append(_reading(step, options.layout, time.perf_counter() - start))
    if dist.get_rank() == 0:
        warm = [row for row in rows if row["step"] >= options.warmup]
        for row in rows:
            print(row)
        assert len({row["compiled_kernels"] for row in warm}) == 1, "kernels were compiled after the warm-up"
        write_rows(
            options.out, environment(f"torchrun --nproc-per-node {dist.get_world_size()} benchmarks/gpu_soak.py"), rows
        )
    megatron_ep_v2.destroy_buffers()
    dist.destroy_process_group()


def _layer(dispatcher: Any, num_tokens: int, step: int) -> None:
    """One layer, forward and backward, with every gradient checked: experts pass rows through, weighted."""
    generator = torch.Generator("cuda").manual_seed(step * 64 + dist.get_rank())
    x = torch.randn(num_tokens, HIDDEN, generator=generator, device="cuda").bfloat16().requires_grad_()
    scores = torch.rand(num_tokens, EXPERTS, generator=generator, device="cuda")
    top = scores.topk(TOPK, dim=1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top.indices, True)
    probs = torch.zeros_like(scores).scatter_(1, top.indices, top.values.softmax(dim=1)).requires_grad_()

    rows, sent_probs = dispatcher.dispatch_preprocess(x, chosen, probs)
    rows, row_probs = dispatcher.token_dispatch(rows, sent_probs)
    rows, _, row_probs = dispatcher.dispatch_postprocess(rows, row_probs)
    rows = (rows * row_probs[:, None]).to(rows.dtype)
    y = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))
    y.float().sum().backward()
    if num_tokens:
        error = (y.detach() - x.detach()).float().norm() / x.detach().float().norm()
        assert error < 2e-2, f"step {step}: the weighted rows of a token must add up to the token, off by {error:.1e}"
        assert bool(torch.isfinite(x.grad).all()) and bool(torch.isfinite(probs.grad).all())


def _reading(step: int, layout: str, seconds: float) -> dict[str, Any]:
    cache = Path(os.environ.get("EP_JIT_CACHE_DIR", str(Path.home() / ".deep_ep"))) / "cache"
    free, total = torch.cuda.mem_get_info()
    values = torch.tensor([torch.cuda.memory_reserved(), torch.cuda.memory_allocated(), total - free], device="cuda")
    dist.all_reduce(values, dist.ReduceOp.MAX)
    reserved, allocated, used = (round(value / 2**20, 1) for value in values.tolist())
    torch.cuda.reset_peak_memory_stats()
    return {
        "step": step,
        "layout": layout,
        "seconds": round(seconds, 2),
        "reserved_mib": reserved,
        "allocated_mib": allocated,
        "device_used_mib": used,
        "compiled_kernels": sum(1 for _ in cache.iterdir()) if cache.is_dir() else 0,
    }


if __name__ == "__main__":
    main()
