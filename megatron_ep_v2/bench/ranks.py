"""The ranks of a benchmark: torchrun's, or processes that it starts itself."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2.gpus import gpu_of
from megatron_ep_v2.settings import Launch, environment

_GRACE = 5.0  # seconds for the others once a rank has failed: they may be about to say the same
_TIMEOUT = timedelta(minutes=10)  # of a collective: compiling may take one rank longer than another


def start(ranks: int, arguments: Sequence[str]) -> int:
    """Run `python ARGUMENTS` as `ranks` processes of this host; their worst exit status.

    When one fails, the others are ended: they would wait for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *arguments]
        processes = []
        try:
            for rank in range(ranks):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                variables = {name: str(value) for name, value in place.items()}
                with environment(**variables, EP_BENCH_STORE=f"{folder}/store"):
                    processes.append(subprocess.Popen(command))
            failed_at = None
            while any(process.poll() is None for process in processes):
                if failed_at is None and any(process.poll() for process in processes):
                    failed_at = time.monotonic()
                if failed_at is not None and time.monotonic() - failed_at > _GRACE:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
        return max((abs(process.returncode) for process in processes), default=0)


def command(place: Launch, arguments: Sequence[str]) -> str:
    """What to type to get the same again: with `python` where the ranks were started by `start`, else torchrun."""
    launcher = "python" if place.store else f"torchrun --nproc-per-node {place.local_ranks}"
    return " ".join([launcher, *arguments])


@contextlib.contextmanager
def joined(place: Launch, on_cpu: bool = False) -> Iterator[torch.device]:
    """Join the process group that the environment describes; this rank's device. At the end, buffers and group go.

    Args:
        on_cpu: Even where there are GPUs.

    Raises:
        SettingsError: Fewer GPUs than ranks on this host.
    """
    device = join(place, on_cpu)
    try:
        yield device
    finally:
        megatron_ep_v2.destroy_buffers()
        dist.destroy_process_group()


def join(place: Launch, on_cpu: bool = False) -> torch.device:
    """See `joined`."""
    if torch.cuda.is_available() and not on_cpu:
        device = gpu_of(place.local_rank, place.local_ranks)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, torch.get_num_threads() // place.local_ranks))
    store = f"file://{Path(place.store).resolve()}" if place.store else "env://"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=store,
        rank=place.rank,
        world_size=place.ranks,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    return device
