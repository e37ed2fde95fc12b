"""`python -m megatron_ep_v2 train [--nproc N] ARGS...`: the example's training on this host, to see that it works."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from pathlib import Path

from megatron_ep_v2 import settings
from megatron_ep_v2.cli import prog
from megatron_ep_v2.errors import UnavailableError

_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = (_PACKAGE / "examples", _PACKAGE.parent / "examples")  # as installed, and in the source tree
_SCRIPT = "pretrain_qwen3_moe.py"
_NEEDED = ("matplotlib", "tqdm")  # of the extra "example"


def train(arguments: list[str]) -> None:
    """Train a small Qwen3-MoE on the Python standard library's sources: on all GPUs, or on the CPU with two processes.

    Under torchrun it is one rank of that job; else the process becomes torchrun.

    Args:
        arguments: --nproc and a number of processes; all others are the example's, as its --help lists them.

    Raises:
        UnavailableError: A package that the example needs is missing.
    """
    if lacking := [name for name in _NEEDED if name not in sys.modules and importlib.util.find_spec(name) is None]:
        names = " ".join(lacking)
        raise UnavailableError(f"train needs packages that are not here: {names}", fix=f"pip install {names}")
    help_only = not {"-h", "--help"}.isdisjoint(arguments)
    if help_only:
        print(f"usage: {prog()} train [--nproc N] [options]\n\nN processes on this host. The options are those of:\n")
    if settings.launch() is not None or help_only:
        script = next(folder / _SCRIPT for folder in _FOLDERS if (folder / _SCRIPT).is_file())
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
        return
    parser = argparse.ArgumentParser(prog=f"{prog()} train", add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=_number_of_processes, metavar="N")
    options, rest = parser.parse_known_args(arguments)
    ranks = options.nproc or _ranks()
    settings.export("OMP_NUM_THREADS", str(max(1, _cpus() // ranks)), keep=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    # The ranks call this function again. As a module, it is found where it was found for this process.
    again = ["-m", "megatron_ep_v2", "train"]
    os.execv(sys.executable, [sys.executable, *launcher, "--nproc-per-node", str(ranks), *again, *rest])


def _number_of_processes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"invalid number of processes: {text!r}")
    return int(text)


def _cpus() -> int:
    """Cores that this process may use; macOS does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ranks() -> int:
    from megatron_ep_v2.gpus import gpu_ranks

    return max(2, gpu_ranks())  # with one GPU: on the CPU
