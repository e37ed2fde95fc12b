"""`python ARGUMENTS`, alone or as ranks, in processes forked from the server of harness.py.

A new interpreter spends five seconds of CPU time on importing torch and Megatron, torchrun another two: these spend
none, and are what users start in all but that. What is about an interpreter's start (PYTHONPATH, sitecustomize, import
order) or about torchrun itself takes real ones.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

import torch
import torch.distributed as dist

from tests.helpers.harness import HANG, server
from tests.helpers.rank_process import GRACE


def launched(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun gives to a rank, as far as torch, Megatron and this package read them."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in values.items()}


def python(
    *arguments: str,
    ranks: int = 0,
    cwd: Path | None = None,
    first: Callable[[], None] | None = None,
    **variables: str,
) -> CompletedProcess[str]:
    """Run a script, or a module after -m, on the CPU, without settings of this package.

    Args:
        ranks: 0 = one process; else so many, as torchrun starts them. Once one has failed, the others get GRACE
            seconds.
        first: A top-level function of an importable module, called before the command.
        variables: Environment variables.

    Returns:
        What all of them wrote; the status of the first one that failed, else 0.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MCORE_DEEPEP_V2_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}
    # As torchrun's agent does, which outlives all ranks.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks else None
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        processes, context = [], server()
        for rank in range(max(ranks, 1)):
            given = environment | (launched(rank, ranks, store.port) if store else {})
            more = (arguments, given, str(cwd or Path.cwd()), outputs, first)
            processes.append(context.Process(target=_run, args=more, daemon=True))
        try:
            for process in processes:
                process.start()
            status = _first_failure(processes, arguments)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
        texts = [Path(output).read_text() for output in outputs]
    return CompletedProcess(arguments, status, *texts)


def _first_failure(processes: list, arguments: tuple[str, ...]) -> int:
    status, deadline = 0, time.monotonic() + HANG
    while running := [process for process in processes if process.is_alive()]:
        if not wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic())):
            if status:
                break
            raise TimeoutExpired(list(arguments), HANG)
        if not status and (failed := [process.exitcode for process in processes if process.exitcode]):
            status, deadline = failed[0], time.monotonic() + GRACE
    return status or next((process.exitcode for process in processes if process.exitcode), 0)


def _run(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    cwd: str,
    outputs: list[str],
    first: Callable[[], None] | None,
) -> None:
    """In the new process."""
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    gc.enable()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    as_module = arguments[0] == "-m"
    sys.argv = list(arguments[as_module:])
    sys.path.insert(0, cwd if as_module else str(Path(arguments[0]).resolve().parent))
    if first is not None:
        first()
    if as_module:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")
