"""The rank processes of harness.py, from inside: each answers jobs, in a process group of its own for every one."""

from __future__ import annotations

import datetime
import faulthandler
import gc
import io
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

GRACE = 30.0  # seconds for the other ranks once one has failed


def serve(connection: Connection, stacks: str, environment: dict[str, str]) -> None:
    """Main function of a rank process: answer jobs until the test process goes away."""
    gc.enable()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(stacks, "w") as stacks_file:
        faulthandler.register(signal.SIGUSR1, stacks_file, all_threads=True)
        connection.send_bytes(b"ready")
        while True:
            try:
                job = connection.recv_bytes()
            except (EOFError, ConnectionResetError):
                return
            connection.send_bytes(_answer(job))


def _answer(job: bytes) -> bytes:
    """Run one job; the pickled pair (True, result) or (False, traceback)."""
    try:
        answer = io.BytesIO()
        _Pickler(answer).dump((True, _run_one(*pickle.loads(job))))
        return answer.getvalue()
    except BaseException:  # noqa: BLE001 - SystemExit and KeyboardInterrupt too: the test process must hear of them
        return pickle.dumps((False, traceback.format_exc()))


class _Pickler(pickle.Pickler):
    """Pickles tensors as their values, on the host: quick, and for every dtype (plain pickle refuses float8)."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor:
            return NotImplemented
        host = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return _tensor, (host.view(-1).view(torch.uint8).numpy().tobytes(), host.dtype, host.shape)


def _tensor(content: bytes, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


def _run_one(
    fn: Callable[..., Any],
    args: tuple,
    rank: int,
    size: int,
    store: str,
    backend: str,
    timeout: float,
    env: dict[str, str],
) -> Any:
    environment = dict(os.environ)
    os.environ.update(env)
    if backend == "nccl":
        from megatron_ep_v2.gpus import gpu_of  # not above: a job looks at a Megatron without this package

        torch.cuda.set_device(gpu_of(rank, size))
    limit = datetime.timedelta(seconds=timeout + GRACE)  # the test process is the judge of time
    store_of_run = dist.FileStore(store, size)
    dist.init_process_group(backend, store=store_of_run, rank=rank, world_size=size, timeout=limit)
    # A rank with nothing to do must not close its connections while another one is still being connected.
    store_of_run.set(f"connected/{rank}", "")
    store_of_run.wait([f"connected/{other}" for other in range(size)], limit)
    failed = True
    try:
        answer = fn(dist.group.WORLD, *args)
        failed = False
        return answer
    finally:
        # NCCL's destruction waits for kernels that wait for the others, so one that failed would not be reported. Its
        # process is about to be ended anyway.
        if dist.is_initialized() and not (failed and backend == "nccl"):
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
