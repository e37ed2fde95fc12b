"""Dispatch -> identity experts -> combine, forward and backward, on the CPU: Megatron's alltoall dispatcher beside
its flex dispatcher on the reference buffer, in one run.

Nothing but the dispatchers is timed: expert rows pass through unchanged, and gradients for the hidden states and the
probabilities both flow. Variants alternate, so that a busy machine slows all. Outputs and gradients are compared
before anything is timed. Times are medians over repeats of the slowest rank; peak memory is the rise of a process'
resident set during a pass, largest over ranks (Linux only).

    python benchmarks/cpu_dispatch.py [--ranks 2 4] [--tokens 4096] [--out benchmarks/results/cpu_dispatch.jsonl]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import environment, make_dispatcher, write_rows

VARIANTS = ("alltoall", "flex compact", "flex expanded")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative L2: the dispatchers add up in different orders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write rows, below an environment header, to this JSONL file")
    options = parser.parse_args()

    rows = []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            answer = mp.get_context("spawn").SimpleQueue()
            mp.spawn(_rank_main, (ranks, f"{folder}/store", options, answer), nprocs=ranks)
            rows += answer.get()
    _print_table(rows)
    write_rows(options.out, environment("python benchmarks/cpu_dispatch.py"), rows)


def _rank_main(rank: int, ranks: int, store: str, options: argparse.Namespace, answer: Any) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # Megatron compiles small functions; all variants run them eagerly
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    passes = {variant: _make_pass(variant, rank, options) for variant in VARIANTS}
    _check_agreement({variant: run() for variant, run in passes.items()}, options.dtype)

    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    peaks: dict[str, list[int]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.repeats):
        for variant, run in passes.items():
            before = _reset_peak_memory()
            dist.barrier()
            start = time.perf_counter()
            result = run()
            times[variant].append(time.perf_counter() - start)
            peaks[variant].append(_peak_memory() - before)
            del result
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, (times, peaks))
    if rank == 0:
        answer.put([_row(variant, ranks, options, gathered) for variant in VARIANTS])
    dist.destroy_process_group()


def _row(variant: str, ranks: int, options: argparse.Namespace, gathered: list[Any]) -> dict[str, Any]:
    slowest = [max(values) for values in zip(*(times[variant] for times, _ in gathered), strict=True)]
    return {
        "variant": variant,
        "ranks": ranks,
        "tokens_per_rank": options.tokens,
        "hidden": options.hidden,
        "experts": options.experts,
        "topk": options.topk,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "forward_backward_ms": round(statistics.median(slowest) * 1e3, 1),
        "forward_backward_ms_all": [round(value * 1e3, 1) for value in slowest],
        "peak_memory_mib": round(max(statistics.median(peaks[variant]) for _, peaks in gathered) / 2**20, 1),
    }


def _make_pass(variant: str, rank: int, options: argparse.Namespace) -> Any:
    """A function that runs one forward and backward and returns (output, grad of hidden states, grad of probs)."""
    from qwen3_moe import cpu

    import megatron_ep_v2

    kind, _, layout = variant.partition(" ")
    if kind == "flex":
        # Each variant keeps the manager that was bound when it was built; the buffer is shared, as in training.
        megatron_ep_v2.install(buffer="reference", layout=layout)
    else:
        cpu.substitute_alltoall_dispatcher()
    dispatcher = make_dispatcher(kind, hidden=options.hidden, experts=options.experts, topk=options.topk)
    generator = torch.Generator().manual_seed(rank)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.hidden, generator=generator).to(dtype)
    grad_output = torch.randn(options.tokens, options.hidden, generator=generator).to(dtype)
    scores = torch.rand(options.tokens, options.experts, generator=generator)
    top = scores.topk(options.topk, dim=1)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top.indices, True)
    probabilities = torch.zeros_like(scores).scatter_(1, top.indices, top.values.softmax(dim=1))

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, probs = hidden.clone().requires_grad_(), probabilities.clone().requires_grad_()
        rows, sent_probs = dispatcher.dispatch_preprocess(x, chosen, probs)
        rows, row_probs = dispatcher.token_dispatch(rows, sent_probs)
        rows, _, row_probs = dispatcher.dispatch_postprocess(rows, row_probs)
        output = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))
        torch.autograd.backward([output, row_probs], [grad_output, torch.ones_like(row_probs)])
        return output.detach(), x.grad, probs.grad

    return run


def _check_agreement(results: dict[str, Any], dtype: str) -> None:
    """Refuse to time a variant whose output or gradients are not those of the first."""
    first, *others = VARIANTS
    for other in others:
        for name, mine, theirs in zip(("output", "grad x", "grad probs"), results[other], results[first], strict=True):
            error = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
            if not error <= TOLERANCE[dtype]:
                raise SystemExit(f"{other}: {name} differs from {first}'s by {error:.1e} (relative L2); nothing timed")


def _reset_peak_memory() -> int:
    """Start a new high-water mark; return the resident set now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_memory() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _print_table(rows: list[dict[str, Any]]) -> None:
    base = {row["ranks"]: row for row in rows if row["variant"] == VARIANTS[0]}
    print(f"{'ranks':>5}  {'variant':<14}  {'ms':>8}  {'ratio':>6}  {'peak MiB':>9}  {'ratio':>6}")
    for row in rows:
        reference = base[row["ranks"]]
        print(
            f"{row['ranks']:>5}  {row['variant']:<14}  {row['forward_backward_ms']:>8.1f}"
            f"  {row['forward_backward_ms'] / reference['forward_backward_ms']:>6.2f}  {row['peak_memory_mib']:>9.1f}"
            f"  {row['peak_memory_mib'] / reference['peak_memory_mib']:>6.2f}"
        )


if __name__ == "__main__":
    main()
