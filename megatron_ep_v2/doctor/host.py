"""Facts about this host that need no import that may fail: driver, toolkit, folders, RDMA devices.

Nothing here raises: facts that cannot be read are empty or None, and the checks interpret that.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ep_v2 import cuda_toolkit, settings
from megatron_ep_v2.buffers.gin import RDMA_DEVICES
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.generations import PACKAGES, Generation, normalised

INFINIBAND = RDMA_DEVICES
MODULES = Path("/sys/module")
MOUNTS = Path("/proc/mounts")
# Packages whose version may explain a failure, by the names of their wheels.
_PACKAGES = re.compile(
    r"megatron[-_](core|ep[-_]v2)|.*deep[-_]?ep.*|deepinfer.*|transformer[-_]engine.*|torch|triton"
    r"|nvidia[-_](nccl|nvshmem|cuda[-_]runtime|cuda[-_]nvcc|ml[-_]py).*"
)


def read_host() -> dict[str, Any]:
    """Python, versions of distributions, those of DeepEP's packages, DeepGEMM, variables, settings, GPUs as the driver
    sees them, RDMA devices."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": _packages(),
        "distributions": _distributions(),
        "deep_gemm": importlib.util.find_spec("deep_gemm") is not None,
        "environment": settings.shown_environment(),
        "settings": _settings(),
        "driver": _driver(),
        "links": _links(_output("nvidia-smi", "topo", "-m")),
        "rdma": {
            "devices": _rdma_devices(),
            "ibstat": shutil.which("ibstat") is not None,
            "modules": {name: _text(MODULES / name / "version") for name in ("efa", "gdrdrv")},
        },
    }


def _packages() -> dict[str, str]:
    found = importlib.metadata.distributions()
    versions = {
        str(each.metadata["Name"]): each.version for each in found if each.metadata
    }  # half-removed packages have none
    return {name: versions[name] for name in sorted(versions) if _PACKAGES.fullmatch(name.lower())}


def _distributions() -> dict[str, str]:
    """Import name -> "distribution==version" of the packages of DeepEP; without those that no metadata names."""
    found: dict[str, str] = {}
    for each in importlib.metadata.distributions():
        declared = (each.read_text("top_level.txt") or "").split()
        tops = declared or [path.parts[0] for path in each.files or ()]
        for name in PACKAGES:
            if name in tops and each.metadata:  # half-removed ones have none
                found.setdefault(name, f"{normalised(str(each.metadata['Name']))}=={each.version}")
    return found


def _settings() -> dict[str, Any]:
    """Values and sources of the settings; or the defaults and the error of an invalid variable."""
    try:
        return {**asdict(settings.resolve()), "error": None}
    except SettingsError as error:
        return {**asdict(settings.resolve({})), "error": {"what": error.what, "needed": error.needed, "fix": error.fix}}


def _driver() -> dict[str, Any]:
    rows = _output("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader").splitlines()
    gpus = [[cell.strip() for cell in row.split(",")] for row in rows if row.count(",") == 2]
    cuda = re.search(r"CUDA (?:\w+ )?Version\s*:\s*([\d.]+)", _output("nvidia-smi"))
    return {
        "gpus": [{"name": name, "sm": sm} for name, sm, _ in gpus],
        "version": gpus[0][2] if gpus else None,
        "cuda": cuda[1] if cuda else None,
    }


def _links(matrix: str) -> list[list[str]]:
    """One row per GPU: its connections to GPU 0, 1, ... ("NV18", "PIX", "X" to itself)."""
    rows = [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", matrix).splitlines()]
    rows = [row[1:] for row in rows if len(row) > 1 and re.fullmatch(r"GPU\d+", row[0]) and row[1] != "GPU1"]
    return [row[: len(rows)] for row in rows]


def _rdma_devices() -> list[dict[str, Any]]:
    devices = sorted(INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    return [
        {
            "name": device.name,
            "vendor": _text(device / "device" / "vendor"),
            "ports": [
                {name: _text(port / name).rpartition(": ")[2] for name in ("state", "link_layer", "rate")}
                for port in sorted(device.glob("ports/*"))
            ],
        }
        for device in devices
    ]


def read_toolkit(environment: Mapping[str, str], generation: Generation) -> dict[str, Any]:
    """Find the compiler that DeepEP's JIT will call, as DeepEP does, and its cache folder.

    Args:
        environment: Variables after the import of DeepEP, which adds those that it was built with.
        generation: Of the package in use.
    """
    toolkit = cuda_toolkit.found_by_deep_ep(environment, generation)
    folders = generation.cache_folders(environment, Path.home())
    return {
        "nvcc": toolkit.nvcc,
        "version": toolkit.version,
        "cuobjdump": toolkit.cuobjdump,
        "readable": toolkit.can_be_read_by(generation),
        "by_us": cuda_toolkit.provided is not None,
        "cache": _folder(folders[0] if folders else Path.home()),
    }


def _folder(path: Path) -> dict[str, Any]:
    """Whether files can be written to a folder, tried with a temporary file in its nearest existing parent; its free
    room and its kind of file system."""
    nearest = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    error = None
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as failure:
        error = failure.strerror
    shown = f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
    free_gib = round(shutil.disk_usage(nearest).free / 2**30, 1)
    return {"path": shown, "error": error, "free_gib": free_gib, "file_system": _file_system(nearest)}


def _file_system(folder: Path) -> str | None:
    """The kind of file system that holds a folder, e.g. "ext4", "nfs4"; None if it cannot be read."""
    rows = [line.split() for line in _text(MOUNTS).splitlines()]
    # A space in a mount point is written as its octal code. Of two mounts on one point the later one counts.
    mounts = {Path(row[1].replace(r"\040", " ")): row[2] for row in rows if len(row) > 2}
    folder = folder.resolve()
    return next((mounts[parent] for parent in (folder, *folder.parents) if parent in mounts), None)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # some files of a port that is down raise it
        return ""


def _output(*command: str) -> str:
    """A program's stdout; "" if it does not exist, fails or takes too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
