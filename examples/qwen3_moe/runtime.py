"""Process group, device, and how all ranks end together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_ep_v2.errors import EPError, SettingsError
from megatron_ep_v2.gpus import gpu_of, gpu_ranks

T = TypeVar("T")


class AgreedExit(SystemExit):
    """Every rank leaves, because one of them raised an error that rank 0 has printed."""


@dataclass(frozen=True)
class Runtime:
    """One rank's place in the run.

    Attributes:
        control: A gloo group for what lives on the host: errors, text, checkpoint barriers.
    """

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def start(cls, device: str = "auto", seed: int = 0) -> Runtime:
        """Join the process group that torchrun's environment describes; expert-parallel size = world size."""
        if "RANK" not in os.environ:
            raise SettingsError(
                "this script runs as one process per rank",
                found="no RANK in the environment",
                fix="torchrun --nproc-per-node 2 examples/pretrain_qwen3_moe.py ...",
            )
        chosen = _choose_device(device)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            dist.init_process_group("nccl")
        else:
            torch.compiler.set_stance("force_eager")  # Megatron's fused functions would need a C++ compiler
            dist.init_process_group("gloo")
        control = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        assert isinstance(control, dist.ProcessGroup)  # every rank is in it
        parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
        if chosen.type == "cuda":
            model_parallel_cuda_manual_seed(seed)
        return cls(dist.get_rank(), dist.get_world_size(), chosen, control)

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank. If it fails on one, rank 0 prints that error and every rank leaves."""
        result, error = None, None
        try:
            result = action()
        except EPError as raised:
            error = f"{type(raised).__name__}: {raised}"
        errors: list[str | None] = [None] * self.world
        dist.all_gather_object(errors, error, group=self.control)
        first = next((e for e in errors if e), None)
        if first is not None:
            self.say(first)
            raise AgreedExit(1)
        return result  # type: ignore[return-value]

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank."""
        box: list[Any] = [self.together(lambda: make() if self.is_main else None)]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def say(self, text: str) -> None:
        """One message on stderr, from rank 0."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _choose_device(wanted: str) -> torch.device:
    """This rank's GPU, or the CPU."""
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    ranks = gpu_ranks()
    if wanted == "cpu" or (wanted == "auto" and ranks < local_world):
        if wanted == "auto" and ranks and local_rank == 0:
            found = f"{local_world} processes but {torch.cuda.device_count()} GPU(s) here: training on the CPU"
            share = "NCCL_MULTI_RANK_GPU_ENABLE=1 has them share a GPU"
            print(f"{found}; {share}", file=sys.stderr, flush=True)
        return torch.device("cpu")
    return gpu_of(local_rank, local_world)
