"""Which GPU a rank of this host takes, and how many ranks the GPUs hold.

One rank a GPU. With NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL (2.30.7 and 2.32.3) accepts several on one, and DeepEP's ranks
reach each other's memory there as well: a host with one GPU runs two ranks on the real kernels. What they compute is
what it is on two GPUs; how fast they are says nothing, since their kernels take turns.
"""

from __future__ import annotations

import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.errors import SettingsError


def gpu_ranks() -> int:
    """Ranks that this host's GPUs hold: one each, or two on a single one that NCCL lets them share; 0 without GPUs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return 2 if gpus == 1 and settings.ranks_share_gpus() else gpus


def gpu_of(local_rank: int, local_ranks: int) -> torch.device:
    """The GPU of a rank, of `local_ranks` on this host; where they share, in turn.

    Raises:
        SettingsError: Fewer GPUs than ranks, and NCCL may not share them.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < local_ranks and not (gpus and settings.ranks_share_gpus()):
        fewer = f"--ranks or --nproc-per-node {gpus}; " if gpus else ""
        share = "; or NCCL_MULTI_RANK_GPU_ENABLE=1, to try things on GPUs that ranks share" if gpus else ""
        raise SettingsError(
            "not enough GPUs",
            found=f"{gpus} for {local_ranks} ranks on this host",
            needed="one GPU a rank",
            fix=f"{fewer}CUDA_VISIBLE_DEVICES= to run on the CPU{share}",
        )
    return torch.device("cuda", local_rank % gpus)
