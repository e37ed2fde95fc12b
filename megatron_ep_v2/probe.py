"""Detects what is installed, deep_ep's generation by its API: V1, V2 and the hybrid-ep branch share one package
name."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from megatron_ep_v2.buffers.carriers import CARRIERS, MEGATRONS_OWN, REFERENCE
from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.settings import Settings

# `import deep_ep` also raises these: its NCCL check asserts, its JIT set-up looks for files, and a missing shared
# library is an OSError.
_IMPORT_FAILURES = (ImportError, AssertionError, FileNotFoundError, OSError)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Result of `probe()`.

    Attributes:
        carriers: Names in `CARRIERS` whose class deep_ep has, in that order.
        have_hybrid: deep_ep imports and has `HybridEPBuffer` (its hybrid-ep branch).
        version: deep_ep's own version string, or None. For reports only.
        failure: Why `import deep_ep` failed, or None.
        cuda: A CUDA device is usable.
    """

    carriers: tuple[str, ...]
    have_hybrid: bool
    version: str | None
    failure: str | None
    cuda: bool

    @property
    def have_deep_ep(self) -> bool:
        """HAVE_DEEP_EP: deep_ep has the class that Megatron's own dispatcher calls."""
        return MEGATRONS_OWN in self.carriers

    @property
    def have_deep_ep_v2(self) -> bool:
        """HAVE_DEEP_EP_V2: deep_ep has a class of its second generation."""
        return any(CARRIERS[name].is_v2 for name in self.carriers)

    def describe(self) -> str:
        """deep_ep as found, in one line."""
        if self.failure is not None:
            return f"deep_ep cannot be imported: {self.failure}"
        names = [CARRIERS[name].deep_ep_class for name in self.carriers] + ["HybridEPBuffer"] * self.have_hybrid
        return f"deep_ep {self.version or 'of unknown version'} with {', '.join(map(str, names)) or 'no known buffer'}"


def import_deep_ep() -> ModuleType:
    """Import deep_ep. Raises whatever its import raises."""
    return importlib.import_module("deep_ep")


@functools.cache
def probe() -> Probe:
    """Probe once and cache the result; `probe.cache_clear()` forgets it."""
    cuda = torch.cuda.is_available()
    try:
        deep_ep = import_deep_ep()
    except _IMPORT_FAILURES as error:
        failure = f"{type(error).__name__}: {error}"
        return Probe(carriers=(), have_hybrid=False, version=None, failure=failure, cuda=cuda)
    return Probe(
        carriers=tuple(c.name for c in CARRIERS.values() if c.deep_ep_class and hasattr(deep_ep, c.deep_ep_class)),
        have_hybrid=hasattr(deep_ep, "HybridEPBuffer"),
        version=getattr(deep_ep, "__version__", None) or _installed_version(),
        failure=None,
        cuda=cuda,
    )


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("deep_ep")
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Choice:
    """The carrier of the tokens.

    Attributes:
        kind: A name of `CARRIERS`, or "megatron": Megatron's own legacy path, unchanged.
        reason: Why it was chosen, for the log.
    """

    kind: str
    reason: str


def choose(found: Probe, settings: Settings, *, managed: bool = False) -> Choice:
    """Choose the buffer.

    Args:
        found: What is installed.
        settings: The requested buffer.
        managed: The caller is this package's own code, so the answer cannot be "megatron".

    Raises:
        UnavailableError: The requested buffer is not installed; or none is, on a GPU machine, where falling back to the
            reference must not be silent.
    """
    asked, source = settings.buffer, settings.source("buffer")
    if asked == "auto":
        return _choose_automatically(found, managed)
    carrier = CARRIERS[asked]
    if not carrier.needs_cuda:
        return Choice(asked, f"asked for by {source}")
    if asked in found.carriers and found.cuda:
        return Choice(asked, f"asked for by {source}; {found.describe()}")
    raise UnavailableError(
        f"the {asked} buffer, asked for by {source}, cannot be used",
        found="no CUDA device" if asked in found.carriers else found.describe(),
        needed=carrier.requirement,
        fix="install deep_ep from its own repository on a machine with GPUs, or ask for buffer=reference",
    )


def _choose_automatically(found: Probe, managed: bool) -> Choice:
    if not found.cuda:
        return Choice(REFERENCE, f"no CUDA device here; {found.describe()}")
    if not found.carriers:
        raise UnavailableError(
            "no DeepEP buffer can be used on this GPU machine",
            found=found.describe(),
            needed="deep_ep >= 2.1 with ElasticBuffer (or the legacy deep_ep with Buffer)",
            fix="install deep_ep from its own repository; to run the slow reference on purpose, "
            "set MCORE_DEEPEP_V2_BUFFER=reference",
        )
    carrier = CARRIERS[found.carriers[0]]
    if carrier.name == MEGATRONS_OWN and not managed:
        return Choice("megatron", f"{found.describe()}; without V2, Megatron's own path stays as it is")
    return Choice(carrier.name, f"{found.describe()}; {carrier.advantage}")


def loaded_nccl_version() -> str | None:
    """The version of the NCCL library in this process, e.g. "2.30.4"; None without one.

    From the library itself (ncclGetVersion): torch.cuda.nccl.version() is the version that torch was compiled with.
    """
    for library in loaded_libraries("libnccl.so"):
        code = ctypes.c_int()
        if ctypes.CDLL(library).ncclGetVersion(ctypes.byref(code)) == 0:
            return f"{code.value // 10000}.{code.value // 100 % 100}.{code.value % 100}"
    return None


def loaded_libraries(name: str) -> list[str]:
    """Paths of the libraries mapped into this process whose file name starts with `name`; deleted files are left
    out."""
    maps = Path("/proc/self/maps")
    lines = (line.split(maxsplit=5) for line in maps.read_text().splitlines()) if maps.exists() else ()
    paths = {Path(line[5]).resolve() for line in lines if len(line) == 6 and Path(line[5]).name.startswith(name)}
    return sorted(str(path) for path in paths if path.exists())
