"""The example trained from scratch on a skewed corpus, with and without redundant experts: overload of ranks, step time
and loss of both runs in one picture.

    python benchmarks/redundant_training.py --out benchmarks/results/cpu/redundant_training.jsonl [--steps 30 ...]

The corpus is that of `examples/skewed_corpus.py`, the router has no load-balancing loss. On all GPUs of this host, or
on the CPU with two processes, whose step times say little. The runs go one after the other, from the same weights
through the same batches; options that are not named in --help are the example's (`python -m megatron_ep_v2 train
--help`). Writes rows, below an environment header, and the picture next to them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from compare_training import load, plot, said, write_rows

import megatron_ep_v2
from megatron_ep_v2.bench.report import environment

ROOT = Path(__file__).resolve().parents[1]
PANELS = ("overload_mean", "seconds", "loss")
# Few experts, so that a replica is a large part of a rank's rows; wide ones, so that a step depends on them.
EXAMPLE = "--num-experts 8 --topk 2 --moe-ffn-hidden-size 256 --lr 2e-3 --aux-loss-coeff 0 --eval-every 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--redundant-experts", type=int, default=2, metavar="R", help="of the second run; default 2")
    parser.add_argument("--balance-min-rows", type=int, default=64, metavar="N", help="default 64, of a small model")
    parser.add_argument("--words", type=int, default=8, help="of the corpus; default 8")
    parser.add_argument("--exponent", type=float, default=2.5, help="of their frequencies; default 2.5")
    options, of_example = parser.parse_known_args()
    if (here := Path(megatron_ep_v2.__file__).resolve().parents[1]) != ROOT:  # its runs take the package of this tree
        raise SystemExit(
            f"megatron_ep_v2 is imported from {here}, so the header would name another commit: PYTHONPATH=."
        )
    header = environment(f"python benchmarks/redundant_training.py {' '.join(sys.argv[1:])}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "skewed.txt"
        words = ["--words", str(options.words), "--exponent", str(options.exponent)]
        _python("examples/skewed_corpus.py", str(corpus), *words)
        shared = ["--data", str(corpus), "--experts", "grouped", *EXAMPLE.split(), *of_example]
        runs = []
        for slots in (0, options.redundant_experts):
            more = ["--redundant-experts", str(slots), "--balance-min-rows", str(options.balance_min_rows)]
            out = folder / str(slots)
            _python("-m", "megatron_ep_v2", "train", *shared, *(more if slots else []), "--out", str(out))
            runs.append(load(f"{slots} replica slots" if slots else "without redundant experts", out))
    for run in runs:  # not where it lay on this machine
        run["summary"]["data"] = run["summary"]["data"].replace(str(corpus), corpus.name)
    write_rows(options.out, header, runs)
    print("\n".join(said(runs)))
    machine = header.get("gpu") or header.get("cpu")
    facts = [f"{machine}, {runs[0]['summary']['processes']} ranks", f"torch {header['torch']}"]
    facts += [f"megatron-core {header['megatron_core']}", f"commit {header['commit']}"]
    plot(runs, options.out, f"{', '.join(facts)}; {header['command']}", PANELS)
    print(json.dumps({"environment": header, "rows": sum(len(run["rows"]) for run in runs)}))


def _python(*arguments: str) -> None:
    """Run it from the repository's root; ends this script where it fails."""
    status = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=sys.stderr, check=False).returncode
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
