"""Facts from importing torch, DeepEP, TransformerEngine and Megatron-Core, in a process that an import may kill.

    python -m megatron_ep_v2.doctor.imports REPORT STEP...

Each step adds one line of JSON to the file REPORT. Only errors that the package itself expects are caught: any other
error ends this process, and facts.py finds out in which step. "-NAME" instead of a step hides a package, so that
Megatron is imported without one that is known to fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ep_v2 import settings
from megatron_ep_v2.errors import EPError, SeamError
from megatron_ep_v2.generations import PACKAGES
from megatron_ep_v2.megatron import symbols


def look_at_torch() -> dict[str, Any]:
    """torch's version, the versions it was built with, and the devices that it can use."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    sm = {device: "{}.{}".format(*torch.cuda.get_device_capability(device)) for device in devices}
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None,
        "devices": [{"name": torch.cuda.get_device_name(device), "sm": sm[device]} for device in devices],
        "warning": str(caught[0].message) if caught else None,
    }


def look_at_package(name: str) -> dict[str, Any]:
    """A package of DeepEP (`probe.Package`); {} if it is not installed. One whose import fails is hidden from Megatron,
    as if it were not installed."""
    from megatron_ep_v2.probe import look_at

    package = look_at(name)
    if package is None:
        return {}
    if package.failure:
        sys.modules[name] = None  # type: ignore[assignment]
    return {**asdict(package), "failure": {"how": package.failure} if package.failure else None}


def look_at_probe() -> dict[str, Any]:
    """The carriers that can be imported; the buffer that `install()` would choose; the NCCL and CUDA libraries then in
    use."""
    from megatron_ep_v2.probe import choose, loaded_libraries, loaded_nccl_version, probe

    found, choice = probe(), None
    with contextlib.suppress(EPError):  # other checks report its causes
        choice = choose(found, settings.resolve()).kind
    environment, libraries = settings.shown_environment(), loaded_libraries("libnccl.so")
    root = environment.get("EP_NCCL_ROOT_DIR") or environment.get("NCCL_DIR")
    return {
        "carriers": found.carriers,
        "choice": choice,
        "environment": environment,
        "nccl": {
            "libraries": libraries,
            "loaded": loaded_nccl_version(),
            "headers": _header_version(Path(root) if root else Path((libraries or [""])[0]).parent.parent),
        },
        "cuda_runtimes": loaded_libraries("libcudart"),
    }


def _header_version(root: Path) -> str | None:
    """Version of the NCCL headers that deep_ep's kernels are compiled with at run time."""
    header = root / "include" / "nccl.h"
    text = header.read_text() if header.exists() else ""
    return ".".join(re.findall(r"#define NCCL_(?:MAJOR|MINOR|PATCH)\s+(\d+)", text)) or None


def look_at_fabric() -> dict[str, Any]:
    """Libraries that NCCL loads for RDMA: the newest symbol version of libmlx5, and whether there is a plugin
    (EFA's)."""
    from megatron_ep_v2.probe import loaded_libraries

    plugin = settings.shown_environment().get("NCCL_NET_PLUGIN", "ofi")
    for library in ("libmlx5.so.1", plugin, f"libnccl-net-{plugin}.so"):
        with contextlib.suppress(OSError):  # there is none
            ctypes.CDLL(library)
    symbols = [re.findall(rb"MLX5_(\d+)\.(\d+)\0", Path(file).read_bytes()) for file in loaded_libraries("libmlx5.so")]
    newest = max(((int(major), int(minor)) for each in symbols for major, minor in each), default=None)
    plugins = loaded_libraries(Path(plugin).name) + loaded_libraries("libnccl-net")
    return {"mlx5": "{}.{}".format(*newest) if newest else None, "net_plugin": bool(plugins)}


def look_at_transformer_engine() -> dict[str, Any]:
    """TransformerEngine's version, None if it is not installed (it is optional), and the cuDNN libraries then in use:
    torch's and its own."""
    from megatron_ep_v2.probe import loaded_libraries

    if importlib.util.find_spec("transformer_engine") is None:
        return {"version": None}
    module = importlib.import_module("transformer_engine")
    return {"version": str(getattr(module, "__version__", "unknown")), "cudnn": loaded_libraries("libcudnn.so")}


def look_at_megatron() -> dict[str, Any]:
    """The symbols that are bound, the packages that own them now, and whether Megatron has its own DeepEP V2
    backend."""
    try:
        version, modules = symbols.find_symbols()
    except SeamError as error:
        return {"error": {"what": error.what, "found": error.found, "needed": error.needed, "fix": error.fix}}
    names = [getattr(modules[symbols.FUSED_A2A], name) for name in ("FusedDispatch", "FusedCombine")]
    names += [getattr(modules[symbols.TOKEN_DISPATCHER], name) for name in (symbols.MANAGER, "fused_dispatch")]
    owners = {symbol.__module__ for symbol in names if symbol is not None}
    return {
        "version": version,
        "error": None,
        "patched_by": sorted(owner for owner in owners if not owner.startswith("megatron.")),
        "have_deep_ep": modules[symbols.FUSED_A2A].HAVE_DEEP_EP,
        "own_v2_backend": hasattr(modules[symbols.FUSED_A2A], "deepepv2_dispatch"),
    }


STEPS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": look_at_torch,
    **{name: functools.partial(look_at_package, name) for name in PACKAGES},
    "probe": look_at_probe,
    "fabric": look_at_fabric,
    "transformer_engine": look_at_transformer_engine,
    "megatron": look_at_megatron,
}


def main(report: str, steps: list[str]) -> None:
    """Run the steps; writes the facts of each when it has finished."""
    for step in steps:
        if step.startswith("-"):
            sys.modules[step[1:]] = None  # type: ignore[assignment]
        else:
            found = STEPS[step]()
            with open(report, "a") as lines:
                lines.write(json.dumps({step: found}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
