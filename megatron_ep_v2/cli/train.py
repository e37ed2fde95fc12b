"""`python -m megatron_ep_v2 train [--nproc N] ARGS...`: the example's training on this host, to see that it works."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from megatron_ep_v2 import settings
from megatron_ep_v2.cli import prog

_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = (_PACKAGE / "examples", _PACKAGE.parent / "examples")  # as installed, and in the source tree
_SCRIPT = "pretrain_qwen3_moe.py"


def train(arguments: list[str]) -> None:
    """Train a small Qwen3-MoE on the Python standard library's sources: on all GPUs, or on the CPU with two processes.

    Under torchrun it is one rank of that job; else the process becomes torchrun.

    Args:
        arguments: --nproc and a number of processes; all others are the example's, as its --help lists them.
    """
    script = next(folder / _SCRIPT for folder in _FOLDERS if (folder / _SCRIPT).is_file())
    if settings.launch() is not None or {"-h", "--help"} & set(arguments):
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
        return
    parser = argparse.ArgumentParser(prog=f"{prog()} train", add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=int)
    options, rest = parser.parse_known_args(arguments)
    ranks = options.nproc or _ranks()
    settings.export("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)), keep=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    os.execv(sys.executable, [sys.executable, *launcher, "--nproc-per-node", str(ranks), str(script), *rest])


def _ranks() -> int:
    import torch

    return max(2, torch.cuda.device_count())  # with one GPU: on the CPU
