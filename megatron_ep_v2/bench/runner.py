"""What the scripts in benchmarks/ share: arguments, ranks, right results before times, rows below a header.

A script names its options and its cases:

    def measure(run: Run) -> Iterator[list[Row]]:
        cases = {"plain": ..., "fused": ...}
        run.require_equal(cases, "plain", 5e-3)
        times = run.time(cases)
        yield [{"variant": name, **spread("alone", times[name]["alone"])} for name in cases]

    if __name__ == "__main__":
        main(__doc__, measure, add_options)

It runs under torchrun on the ranks that it finds; else it starts its own, `--ranks` of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_ep_v2 import settings
from megatron_ep_v2.bench import check, ranks, report, timing
from megatron_ep_v2.bench.rows import Row
from megatron_ep_v2.buffers.carriers import DEFAULT_V2, REFERENCE
from megatron_ep_v2.errors import EPError, SettingsError
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.probe import probe

K = TypeVar("K")


class Run:
    """One rank of a benchmark.

    Attributes:
        options: Of the command line.
        device: This rank's.
        cpu: Whether this is a rehearsal, or a measurement, on the CPU.
        buffer: The carrier to ask for: on GPUs that of DeepEP V2, on the CPU the reference.
        rows: What was measured so far.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device, command: str, line: Callable[[Row], str]):
        self.options, self.device, self.cpu = options, device, device.type == "cpu"
        self.buffer = REFERENCE if self.cpu else probe().v2_carrier or DEFAULT_V2
        self.rows: list[Row] = []
        self._line = line
        self._header = report.environment(command) if dist.get_rank() == 0 else None

    @property
    def ranks(self) -> int:
        return dist.get_world_size()

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def generator(self, seed: int = 0) -> torch.Generator:
        """A generator on this rank's device, another one on each rank."""
        return torch.Generator(self.device).manual_seed(64 * seed + self.rank)

    def require_equal(
        self, cases: Mapping[K, Callable[[], check.Tensors]], expected: K | check.Tensors, tolerance: float
    ) -> dict[K, float]:
        """Run each case once and compare: see `check.require_equal`.

        Args:
            expected: The case that the others are compared with, or what all of them should compute.
            tolerance: The largest relative L2 that is right.
        """
        results: dict[Any, check.Tensors] = {case: run() for case, run in cases.items()}
        wanted: Any = results[expected] if isinstance(expected, str | tuple) else expected
        return check.require_equal(results, wanted, tolerance, self.device)

    def time(self, runs: Mapping[K, timing.Run], **more: Any) -> dict[K, dict[str, list[float]]]:
        """`timing.time_runs` with `--repeats`."""
        return timing.time_runs(runs, self.options.repeats, self.device, **more)

    def time_alone(self, runs: Mapping[K, timing.Run], **more: Any) -> dict[K, list[float]]:
        """Microseconds of each round, from an idle device."""
        return {case: times["alone"] for case, times in self.time(runs, kinds={"alone": 1}, **more).items()}

    def time_kernels(
        self, runs: Mapping[K, timing.Run], in_graph: Mapping[K, timing.Run] | None = None
    ) -> tuple[dict[K, float], dict[K, float]]:
        """Microseconds of each call: on the device, from a CUDA graph of many; and launched from Python, the mean of
        `timing.IN_A_ROW`, where a small one is bound by the host. On the CPU, the second for both.

        Args:
            runs: One may be "copy", a device copy: a large one is slower in a graph, and its faster time counts.
            in_graph: What is captured instead of some of them.
        """
        kinds = {"in_a_row": timing.IN_A_ROW}
        eager = {
            name: timing.summarise(times["in_a_row"]).median for name, times in self.time(runs, kinds=kinds).items()
        }
        if self.cpu:
            return eager, eager
        times = timing.time_in_graphs({**runs, **(in_graph or {})}, self.options.repeats, self.device)
        return {name: min(us, eager[name]) if name == "copy" else us for name, us in times.items()}, eager

    def say(self, text: str) -> None:
        """To stderr, from rank 0."""
        if self.rank == 0:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def add(self, rows: Iterable[Row]) -> None:
        """Print rows on rank 0. The file is written again with each group of them, so that a run that is cut off leaves
        what it has; its header says `"complete": false` until the end."""
        rows = list(rows)
        self.rows += rows
        if self._header is None:
            return
        for row in rows:
            sys.stdout.write(f"{self._line(row)}\n")
        sys.stdout.flush()
        if self.options.out:
            report.write_rows(self.options.out, self._header | {"complete": False}, self.rows)

    def finish(self) -> None:
        """A JSONL file, header first; and one JSON document as the last line on stdout."""
        if self._header is None:
            return
        if self.options.out:
            report.write_rows(self.options.out, self._header, self.rows)
        sys.stdout.write(json.dumps({"environment": self._header, "rows": self.rows}) + "\n")
        sys.stdout.flush()


def fields(row: Row) -> str:
    """A row as its names and values."""
    return "  ".join(f"{name} {value}" for name, value in row.items())


def main(
    description: str | None,
    measure: Callable[[Run], Iterable[Iterable[Row]]],
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    *,
    line: Callable[[Row], str] = fields,
    repeats: int | None = 20,
    rehearsal: Mapping[str, object] | None = None,
    needs_gpu: bool = True,
    single: bool = False,
) -> None:
    """Run a script; exits with the ranks' status.

    Args:
        description: Of the script, for --help.
        measure: Yields rows, group by group; collective.
        add_options: The script's own options, to those that all have: --ranks, --repeats, --cpu, --out.
        line: A row as it is printed.
        repeats: The default; None = no such option.
        rehearsal: Options that `--cpu` replaces where they were not given: tiny sizes on the reference buffer, to see
            that the script runs. None: no rehearsal.
        needs_gpu: Without GPUs, only the rehearsal.
        single: One rank, on one GPU.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    if not single:
        parser.add_argument("--ranks", type=int, help="to start; default one per GPU, or 2 on the CPU")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help=f"default {repeats}")
    if rehearsal is not None:
        parser.add_argument(
            "--cpu", "--dry-run", action="store_true", help="a rehearsal on the CPU, with tiny sizes: no figures"
        )
    parser.add_argument("--out", type=Path, help="write rows, below an environment header, to this JSONL file")
    options = parser.parse_args()
    if rehearsal is not None and options.cpu:
        parser.set_defaults(**rehearsal)
        options = parser.parse_args()
    try:
        raise SystemExit(_run(options, measure, line, needs_gpu, single))
    except EPError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(2) from None


def _run(
    options: argparse.Namespace,
    measure: Callable[[Run], Iterable[Iterable[Row]]],
    line: Callable[[Row], str],
    needs_gpu: bool,
    single: bool,
) -> int:
    on_cpu = getattr(options, "cpu", False) or not torch.cuda.is_available()
    if on_cpu and needs_gpu and not getattr(options, "cpu", False):
        fix = "--cpu rehearses it" if hasattr(options, "cpu") else None
        raise SettingsError("this benchmark measures GPUs", found="none here", fix=fix)
    place = settings.launch()
    if place is None:
        num_ranks = 1 if single else options.ranks or (2 if on_cpu else gpu_ranks())
        return ranks.start(num_ranks, sys.argv)
    command = ranks.command(place, [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    with ranks.joined(place, on_cpu) as device:
        run = Run(options, device, command, line)
        for rows in measure(run):
            run.add(rows)
        run.finish()
    return 0
