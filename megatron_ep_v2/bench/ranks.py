"""The ranks of a benchmark: torchrun's, or processes that it starts itself."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.settings import Launch, environment

_GRACE = 5.0  # seconds for the others once a rank has failed: they may be about to report the same error
_TIMEOUT = timedelta(minutes=10)  # of a collective: compiling takes some ranks longer than others


def start(ranks: int, arguments: Sequence[str]) -> int:
    """Run `python -m megatron_ep_v2 bench ARGUMENTS` as `ranks` processes of this host; returns their worst exit
    status.

    If one fails, the others are ended, because they would wait for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "megatron_ep_v2", "bench", *arguments]
        processes = []
        try:
            for rank in range(ranks):
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                variables = {name: str(value) for name, value in numbers.items()}
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


def join(job: Launch) -> torch.device:
    """Join the job's process group; returns this rank's device."""
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if job.local_ranks > gpus:
            raise SettingsError(
                "not enough GPUs",
                found=f"{gpus} for {job.local_ranks} ranks on this host",
                needed="one GPU a rank",
                fix=f"--ranks {gpus}, or CUDA_VISIBLE_DEVICES= to run on the CPU",
            )
        device = torch.device("cuda", job.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, torch.get_num_threads() // job.local_ranks))
    store = f"file://{Path(job.store).resolve()}" if job.store else "env://"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=store,
        rank=job.rank,
        world_size=job.ranks,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    return device
