"""The generations of DeepEP, told apart by their API: they share package names, and forks have version numbers of their
own. One row for each; whatever rests on a generation (probe, buffers, doctor, errors) reads it here.

Imports neither torch nor deep_ep.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from megatron_ep_v2 import versions

# Import names under which DeepEP is installed. The wheels of 2.5 have one of their own, DeepEP itself has not.
PACKAGES = ("deep_ep", "deep_ep_v25")

BUFFER_CLASSES = ("EPBuffer", "ElasticBuffer", "Buffer", "HybridEPBuffer")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation of DeepEP.

    Attributes:
        name: As in reports.
        api: What tells it from the others, in words.
        nccl: Oldest NCCL that it runs with; None = it does not use NCCL's device API.
        nccl_as_built: Below NCCL 2.31 it needs the very NCCL that it was built with.
        nvcc: Oldest CUDA compiler for its kernels, which it compiles at run time; None = it compiles none.
        nvcc_blackwell: The same for GPUs of SM 10.0.
        needs_cuobjdump: It reads its kernels with cuobjdump.
        cache: Folder of compiled kernels, below the home folder; EP_JIT_CACHE_DIR names another.
        cache_is_a_list: EP_JIT_CACHE_DIR may name several, separated by colons.
        cache_may_be_shared: The cache is safe on a network file system.
        max_local_experts: Most experts on one rank.
        gin_needs_gdaki: Its RDMA goes through NCCL's GDAKI (Mellanox only), so not over EFA.
        fault: Why this package does not carry it; None = it does.
    """

    name: str
    api: str
    nccl: str | None = None
    nccl_as_built: bool = False
    nvcc: str | None = None
    nvcc_blackwell: str | None = None
    needs_cuobjdump: bool = False
    cache: str | None = None
    cache_is_a_list: bool = False
    cache_may_be_shared: bool = False
    max_local_experts: int | None = None
    gin_needs_gdaki: bool = False
    fault: str | None = None

    def cache_folders(self, environ: Mapping[str, str], home: Path) -> list[Path]:
        """Folders of compiled kernels, as these variables and this home folder have them; [] if it compiles none."""
        if self.cache is None:
            return []
        named = environ.get("EP_JIT_CACHE_DIR", "")
        names = named.split(":") if self.cache_is_a_list else [named]
        return [Path(name) for name in names if name] or [home / self.cache]


GENERATIONS: dict[str, Generation] = {
    row.name: row
    for row in (
        Generation(
            name="2.5",
            api="EPBuffer",
            nccl=versions.NCCL_25,
            nvcc=versions.NVCC_25,
            nvcc_blackwell=versions.NVCC_25,
            cache=".dj",
            cache_is_a_list=True,
            cache_may_be_shared=True,
            max_local_experts=512,  # layout/ep/workspace.cuh
            gin_needs_gdaki=True,
        ),
        Generation(
            name="2.1",
            api="ElasticBuffer, whose dispatch takes do_zero_padding",
            nccl=versions.NCCL,
            nccl_as_built=True,
            nvcc=versions.NVCC,
            nvcc_blackwell=versions.NVCC_BLACKWELL,
            needs_cuobjdump=True,
            cache=".deep_ep",
            max_local_experts=256,  # deep_ep 2.1.0, csrc and layout.cuh
        ),
        Generation(
            name="2.0",
            api="ElasticBuffer, whose dispatch takes no do_zero_padding",
            nccl=versions.NCCL,
            nccl_as_built=True,
            nvcc=versions.NVCC,
            nvcc_blackwell=versions.NVCC_BLACKWELL,
            needs_cuobjdump=True,
            cache=".deep_ep",
            fault="older than 2.1: its padding rows are not zero, and its combine between hosts is faulty",
        ),
        Generation(
            name="hybrid-ep",
            api="HybridEPBuffer, and neither EPBuffer nor ElasticBuffer",
            fault="the branch hybrid-ep, which Megatron's own backend hybridep calls",
        ),
        Generation(name="legacy", api="Buffer, and no newer class"),
    )
}


WITH_WHEELS = tuple(name for name in GENERATIONS if any(row[0] == name for row in versions.WHEELS))


def detect(package: ModuleType) -> str | None:
    """The generation of an imported package of DeepEP: a name of `GENERATIONS`, or None if it has no known buffer."""
    if hasattr(package, "EPBuffer"):
        return "2.5"
    if hasattr(package, "ElasticBuffer"):
        parameters = inspect.signature(package.ElasticBuffer.dispatch).parameters
        return "2.1" if "do_zero_padding" in parameters else "2.0"
    if hasattr(package, "HybridEPBuffer"):
        return "hybrid-ep"
    return "legacy" if hasattr(package, "Buffer") else None


def install_command(generation: str, torch_version: str = "") -> str:
    """The commands that install a generation from the package registry.

    Args:
        generation: "2.1" or "2.5".
        torch_version: The torch that is installed: the wheel built for it is taken if there is one; else the first of
            the generation, with its torch.

    Returns:
        One line for a shell.
    """
    wheels = [row[1:] for row in versions.WHEELS if row[0] == generation]
    fitting = [row for row in wheels if _series(row[2]) == _series(torch_version)]
    distribution, version, torch, nccl = (fitting or wheels)[0]
    command = (
        f"pip install {distribution}=={version}" if fitting else f"pip install torch=={torch} {distribution}=={version}"
    )
    if nccl is not None:
        command += f" && pip install --no-deps 'nvidia-nccl-cu13{nccl}'"
    return command


def _series(version: str) -> list[str]:
    return version.split(".")[:2]
