"""The CUDA toolkit with which DeepEP compiles its kernels at run time: the one that DeepEP finds by itself, or the one
that pip put into this environment, which DeepEP does not look for.

Imports neither torch nor deep_ep.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from megatron_ep_v2 import settings
from megatron_ep_v2.generations import ALWAYS, GENERATIONS, PACKAGES, Generation

logger = logging.getLogger(__name__)

SYSTEM = Path("/usr/local/cuda")
provided: Toolkit | None = None  # what `provide` has named in CUDA_HOME


@dataclass(frozen=True)
class Toolkit:
    """A toolkit as DeepEP uses it.

    Attributes:
        home: Its folder, for CUDA_HOME.
        nvcc: Path of its compiler.
        version: The compiler's, e.g. "13.0"; None if it does not run.
        cuobjdump: Version of the one next to it, likewise.
    """

    home: Path
    nvcc: str
    version: str | None
    cuobjdump: str | None

    def serves(self, generation: Generation) -> bool:
        """Whether a generation can compile with it, for every GPU."""
        least = generation.nvcc_blackwell or "0"
        recent = self.version is not None and _numbers(self.version) >= _numbers(least)
        return recent and self.can_be_read_by(generation)

    def can_be_read_by(self, generation: Generation) -> bool:
        """Whether a generation understands what this cuobjdump prints, if it needs one."""
        below = generation.cuobjdump_below
        return below is None or (self.cuobjdump is not None and _numbers(self.cuobjdump) < _numbers(below))


def found_by_deep_ep(environ: Mapping[str, str], generation: Generation) -> Toolkit:
    """The toolkit that DeepEP takes: what its variable for the compiler names, or CUDA_HOME, CUDA_PATH, the nvcc on
    PATH, or /usr/local/cuda."""
    on_path = shutil.which("nvcc")
    named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    home = Path(named) if named else Path(on_path).parent.parent if on_path else SYSTEM
    return _at(home, generation.variable("JIT_NVCC_COMPILER", environ))


def installed_by_pip() -> Toolkit | None:
    """The toolkit in this environment's site-packages, of NVIDIA's wheels for CUDA 13; None if there is no nvcc."""
    spec = PathFinder.find_spec("nvidia")  # also where a stand-in is in sys.modules
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / "cu13" / "bin" / "nvcc").exists():
            return _at(Path(folder) / "cu13")
    return None


def provide() -> None:
    """Before an import of DeepEP, which Megatron imports, too: set CUDA_HOME to pip's toolkit if an installed package
    of DeepEP can compile with that one and not with what it would find. A CUDA_HOME, CUDA_PATH or compiler that the
    user named stays."""
    global provided
    environ = settings.shown_environment()
    for package in PACKAGES:
        if package in sys.modules or importlib.util.find_spec(package) is None:
            continue
        # The main branch's 2.5 is deep_ep, too: who built that has the toolkit for it.
        generation = GENERATIONS[ALWAYS.get(package, "2.1")]
        named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
        if named or generation.variable("JIT_NVCC_COMPILER", environ):
            continue
        ours = installed_by_pip()
        if ours and ours.serves(generation) and not found_by_deep_ep(environ, generation).serves(generation):
            logger.info("CUDA_HOME=%s: CUDA %s of this environment, for DeepEP's kernels", ours.home, ours.version)
            settings.export("CUDA_HOME", str(ours.home))
            provided = ours
            return


def _at(home: Path, nvcc: str | None = None) -> Toolkit:
    nvcc = nvcc or str(home / "bin" / "nvcc")
    return Toolkit(home, nvcc, _version(nvcc), _version(str(home / "bin" / "cuobjdump")))


@functools.cache  # `provide` runs before many imports
def _version(program: str) -> str | None:
    try:
        said = subprocess.run([program, "--version"], capture_output=True, errors="replace", timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release (\d+\.\d+)", said)
    return release[1] if release else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
