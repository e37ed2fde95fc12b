"""The generations of DeepEP, recognised by their API: they share package names, and forks have version numbers of their
own. One row for each; whatever rests on a generation (probe, buffers, doctor, errors) reads it here.

Imports neither torch nor deep_ep.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from megatron_ep_v2 import versions

# Import names under which DeepEP is installed. The wheels of 2.5 have one of their own, DeepEP itself has not.
PACKAGES = ("deep_ep", "deep_ep_v25")
ALWAYS = {"deep_ep_v25": "2.5"}  # import names that a single generation has

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
        cuobjdump_below: It finds its kernels in the text that cuobjdump prints, which this version prints another way;
            None = it needs no cuobjdump.
        cache: Folder of compiled kernels, below the home folder; EP_JIT_CACHE_DIR names another.
        cache_may_be_shared: The cache is safe on a network file system.
        on_deep_jit: It compiles with DeepJIT, which also reads variables with DJ_ for EP_, and takes a list of folders
            for EP_JIT_CACHE_DIR, with colons; it writes to the first.
        nic_variable: Variable with the name of the RDMA device whose speed it asks `ibstat` for; None = always mlx5_0.
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
    cuobjdump_below: str | None = None
    cache: str | None = None
    cache_may_be_shared: bool = False
    on_deep_jit: bool = False
    nic_variable: str | None = None
    max_local_experts: int | None = None
    gin_needs_gdaki: bool = False
    fault: str | None = None

    def variable(self, name: str, environ: Mapping[str, str]) -> str | None:
        """The value of a variable of its compiler, e.g. "JIT_CACHE_DIR", for EP_JIT_CACHE_DIR; None if it is unset."""
        return environ.get(f"EP_{name}") or (environ.get(f"DJ_{name}") if self.on_deep_jit else None)

    def cache_folders(self, environ: Mapping[str, str], home: Path) -> list[Path]:
        """Folders of compiled kernels, as these variables and this home folder have them, the one that is written to
        first; [] if it compiles none."""
        if self.cache is None:
            return []
        named = self.variable("JIT_CACHE_DIR", environ) or ""
        names = named.split(":") if self.on_deep_jit else [named]
        return [Path(name) for name in names if name] or [home / self.cache]


_2_1 = Generation(
    name="2.1",
    api="ElasticBuffer, whose dispatch takes do_zero_padding",
    nccl=versions.NCCL,
    nccl_as_built=True,
    nvcc=versions.NVCC,
    nvcc_blackwell=versions.NVCC_BLACKWELL,
    cuobjdump_below=versions.CUOBJDUMP_BELOW,
    cache=".deep_ep",
    nic_variable="EP_NIC_NAME",
    max_local_experts=256,  # deep_ep 2.1.0, csrc and layout.cuh
)

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
            cache_may_be_shared=True,
            on_deep_jit=True,
            max_local_experts=512,  # layout/ep/workspace.cuh
            gin_needs_gdaki=True,
        ),
        _2_1,
        replace(
            _2_1,
            name="2.0",
            api="ElasticBuffer, whose dispatch takes no do_zero_padding",
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
    return command if nccl is None else f"{command} && {nccl_command(generation)}"


def nccl_command(generation: str) -> str:
    """The command that installs the NCCL which the wheels of a generation need over torch's."""
    of_wheels = [nccl for name, _, _, _, nccl in versions.WHEELS if name == generation and nccl is not None]
    needed = of_wheels[0] if of_wheels else f">={GENERATIONS[generation].nccl}"
    return f"pip install --no-deps 'nvidia-nccl-cu13{needed}'"


def nvcc_command(generation: str) -> str:
    """The command that installs the compiler which a generation needs, as wheels; `cuda_toolkit` finds it there."""
    wheels = next((row[1:] for row in versions.NVCC_WHEELS if row[0] == generation), versions.NVCC_WHEELS[0][1:])
    command = f"pip install {' '.join(map(repr, wheels))}"
    if GENERATIONS[generation].nvcc == versions.NVCC_25:
        command += f" && pip install --no-deps {versions.CUDA_RUNTIME_25!r}"
    return command


def of_distribution(distribution: str) -> str | None:
    """The generation that wheels of this name hold; None if they are none of `versions.WHEELS`."""
    return next((row[0] for row in versions.WHEELS if row[1] == normalised(distribution)), None)


def built_for(distribution: str, version: str) -> list[str]:
    """The versions of torch that a wheel is for; none if it is not one of `versions.WHEELS`."""
    return [row[3] for row in versions.WHEELS if row[1:3] == (normalised(distribution), version)]


def same_series(one: str, other: str) -> bool:
    """Whether two versions of torch have the same first two numbers: a wheel is for all of a series."""
    return _series(one) == _series(other)


def normalised(distribution: str) -> str:
    """A distribution's name as registries write it: metadata may have underscores."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _series(version: str) -> list[str]:
    return version.split(".")[:2]
