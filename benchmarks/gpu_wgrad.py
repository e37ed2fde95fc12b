"""Weight gradients of experts, added to an fp32 gradient buffer, on one GPU: the kernel of `kernels/wgrad.py` next to
torch's grouped GEMM and an addition, at the sizes of a rank of Qwen3-30B-A3B, Qwen3-235B-A22B and DeepSeek-V3.

    python benchmarks/gpu_wgrad.py [--tiles] [--out benchmarks/results/h200x2/wgrad.jsonl]

Every variant is compared with fp64 before it is timed, on rows that no two experts have the same number of. Times are
medians on the device between two events, after enough other work that no launch falls between them; variants alternate.
`--tiles` adds other tile sizes of the kernel.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch

from megatron_ep_v2.bench.check import relative_l2
from megatron_ep_v2.bench.rows import ratio
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.bench.timing import summarise
from megatron_ep_v2.kernels import wgrad_triton

BASE = "grouped GEMM, then add"
ROWS = 32768  # of a rank: 4096 tokens on each of two ranks, top-8, shared by two
# Shape, local experts: with the model's experts on two ranks, and as many as eight ranks have.
SIZES = {
    "qwen3-30b-a3b": (2048, 768, (64, 16)),
    "qwen3-235b-a22b": (4096, 1536, (64, 16)),
    "deepseek-v3": (7168, 2048, (128, 32)),
}
# Weight rows and columns, rows of a step, warps, stages; the first is the kernel's own.
TILES = (
    (wgrad_triton.TILE_N, wgrad_triton.TILE_K, wgrad_triton.ROWS, wgrad_triton.WARPS, wgrad_triton.STAGES),
    *((128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 4)),
    *((256, 128, 64, 8, 3), (64, 256, 64, 4, 3)),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiles", action="store_true", help="other tile sizes of the kernel, too")


def measure(run: Run) -> Iterator[list[Row]]:
    for (shape, (hidden, ffn, counts)), linear in itertools.product(SIZES.items(), ("fc1", "fc2")):
        for experts in counts:
            n, k = (2 * ffn, hidden) if linear == "fc1" else (hidden, ffn)
            facts = {"shape": shape, "linear": linear, "local_experts": experts, "n": n, "k": k, "rows": ROWS}
            yield [facts | row for row in measure_size(experts, n, k, run)]


def measure_size(experts: int, n: int, k: int, run: Run) -> list[Row]:
    generator = torch.Generator("cuda").manual_seed(1)
    share = torch.rand(experts, generator=generator, device="cuda") + 0.5
    ends = (share.cumsum(0) / share.sum() * ROWS).round().to(torch.int32)
    grad, x = (torch.randn(ROWS, size, generator=generator, device="cuda").bfloat16() for size in (n, k))
    out = torch.zeros(experts, n, k, device="cuda")

    def gemm_then_add() -> None:
        out.add_(torch.nn.functional.grouped_mm(grad.t(), x, offs=ends))

    def kernel(tiles: tuple[int, ...]) -> Callable[[], None]:
        def run() -> None:
            wgrad_triton.TILE_N, wgrad_triton.TILE_K, wgrad_triton.ROWS = tiles[:3]
            wgrad_triton.WARPS, wgrad_triton.STAGES = tiles[3:]
            wgrad_triton.add_(out, grad, x, ends)

        return run

    cases = {BASE: gemm_then_add, "kernel": kernel(TILES[0])}
    if run.options.tiles:
        cases |= {f"kernel {tiles}": kernel(tiles) for tiles in TILES[1:]}
    at = [0, *ends.tolist()]
    wanted = torch.stack([grad[a:b].double().t() @ x[a:b].double() for a, b in itertools.pairwise(at[:5])])
    rows, good = {}, {}
    for name, case in cases.items():
        out.zero_()
        try:
            case()
        except Exception as error:  # noqa: BLE001 - a tile that does not fit
            rows[name] = {"variant": name, "status": "unavailable", "reason": str(error)[:200]}
            continue
        error = relative_l2(out[: len(wanted)], wanted)
        rows[name] = {
            "variant": name,
            "status": "ok" if error < 5e-3 else "wrong",
            "relative_l2": float(f"{error:.2g}"),
        }
        if rows[name]["status"] == "ok":
            good[name] = case
    times = run.time_alone(good, warmup=2, queued=True)
    for name, values in times.items():
        us = summarise(values).median
        rows[name] |= {
            "us": round(us, 1),
            "tflops": round(2 * ROWS * n * k / us / 1e6, 1),
            "repeats": run.options.repeats,
        }
        if BASE in times:
            rows[name]["of_gemm_and_add"] = ratio(values, times[BASE])
    return list(rows.values())


if __name__ == "__main__":
    main(__doc__, measure, add_options, single=True)
