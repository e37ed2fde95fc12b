"""Detects what is installed: packages of DeepEP, each with its generation, and CUDA."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_ep_v2 import cuda_toolkit
from megatron_ep_v2.buffers.carriers import CARRIERS, DEFAULT_V2, MEGATRONS_OWN, REFERENCE
from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.generations import BUFFER_CLASSES, GENERATIONS, PACKAGES, WITH_WHEELS, detect, install_command
from megatron_ep_v2.settings import Settings

# The import also raises these: its NCCL check asserts, its JIT set-up looks for files, and a missing shared library is
# an OSError.
_IMPORT_FAILURES = (ImportError, AssertionError, FileNotFoundError, OSError)


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed package of DeepEP.

    Attributes:
        name: Its import name, one of `generations.PACKAGES`.
        generation: A name of `generations.GENERATIONS`, by its API; None = it has no known buffer, or `failure`.
        classes: The buffer classes that it has, of `generations.BUFFER_CLASSES`.
        version: Its own version string, or None. For reports only: forks number their own.
        failure: Why its import failed, or None.
    """

    name: str
    generation: str | None = None
    classes: tuple[str, ...] = ()
    version: str | None = None
    failure: str | None = None

    def describe(self) -> str:
        """The package in a few words."""
        if self.failure is not None:
            return f"{self.name} cannot be imported: {self.failure}"
        return f"{self.name} {self.version or 'of unknown version'} with {', '.join(self.classes) or 'no known buffer'}"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Result of `probe()`.

    Attributes:
        packages: The installed packages of DeepEP, in the order of `generations.PACKAGES`.
        cuda: A CUDA device is usable.
    """

    packages: tuple[Package, ...]
    cuda: bool

    @property
    def carriers(self) -> tuple[str, ...]:
        """Names in `CARRIERS` whose class some package has, in that order."""
        return tuple(name for name in CARRIERS if self.package_of(name) is not None)

    def package_of(self, carrier: str) -> Package | None:
        """The package whose class a carrier wraps; None if it is not here, or the carrier needs none."""
        wanted = CARRIERS[carrier].deep_ep_class
        return next((package for package in self.packages if wanted in package.classes), None)

    @property
    def have_deep_ep(self) -> bool:
        """HAVE_DEEP_EP: deep_ep has the class that Megatron's own dispatcher calls."""
        return MEGATRONS_OWN in self.carriers

    @property
    def have_deep_ep_v2(self) -> bool:
        """HAVE_DEEP_EP_V2: deep_ep has a class of its second generation, 2.0 to 2.5."""
        return any(CARRIERS[name].is_v2 for name in self.carriers)

    @property
    def v2_carrier(self) -> str | None:
        """The carrier of DeepEP V2 that `buffer=auto` takes; None without one."""
        return next((name for name in self.carriers if CARRIERS[name].is_v2), None)

    def versions(self) -> str:
        """Names and versions of the packages that can be imported: what must be equal over a group."""
        return ", ".join(f"{package.name} {package.version}" for package in self.packages if package.failure is None)

    def describe(self) -> str:
        """DeepEP as found, in one line."""
        return "; ".join(package.describe() for package in self.packages) or (
            f"DeepEP is not installed: there is no module named {' or '.join(map(repr, PACKAGES))}"
        )


@functools.cache
def probe() -> Probe:
    """Probe once and cache the result; `probe.cache_clear()` forgets it."""
    packages = tuple(package for name in PACKAGES if (package := look_at(name)) is not None)
    return Probe(packages=packages, cuda=torch.cuda.is_available())


def look_at(name: str) -> Package | None:
    """Import one of `generations.PACKAGES`; None if it is not installed."""
    cuda_toolkit.provide()
    try:
        module = importlib.import_module(name)
    except _IMPORT_FAILURES as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None
        return Package(name=name, failure=f"{type(error).__name__}: {error}")
    return Package(
        name=name,
        generation=detect(module),
        classes=tuple(each for each in BUFFER_CLASSES if hasattr(module, each)),
        version=getattr(module, "__version__", None) or _installed_version(module),
    )


def _installed_version(module: ModuleType) -> str | None:
    try:
        return importlib.metadata.version(module.__name__)
    except importlib.metadata.PackageNotFoundError:
        return None


def load_class(carrier: str, name: str | None = None) -> Any:
    """The class of DeepEP that a carrier wraps, or another of the same package by its name. Raises UnavailableError if
    it is not here."""
    package, wanted = probe().package_of(carrier), CARRIERS[carrier].deep_ep_class
    if package is None or wanted is None:
        raise UnavailableError(
            f"the {carrier} buffer needs a class of DeepEP that is not here",
            found=probe().describe(),
            needed=CARRIERS[carrier].requirement,
            fix=_ways_out(probe(), carrier),
        )
    found = getattr(importlib.import_module(package.name), name or wanted, None)
    if found is None:
        raise UnavailableError(
            f"this {package.name} has no {name or wanted}",
            found=probe().describe(),
            needed=CARRIERS[carrier].requirement,
            fix=_ways_out(probe(), carrier),
        )
    return found


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
        _check_generation(found, asked)
        return Choice(asked, f"asked for by {source}; {found.describe()}")
    raise UnavailableError(
        f"the {asked} buffer, asked for by {source}, cannot be used",
        found="no CUDA device" if asked in found.carriers else found.describe(),
        needed=carrier.requirement,
        fix="run on a machine with GPUs, or ask for buffer=reference"
        if asked in found.carriers
        else _ways_out(found, asked),
    )


def _choose_automatically(found: Probe, managed: bool) -> Choice:
    if not found.cuda:
        return Choice(REFERENCE, f"no CUDA device here; {found.describe()}")
    if not found.carriers:
        raise UnavailableError(
            "no DeepEP buffer can be used on this GPU machine",
            found=found.describe(),
            needed=" or ".join(carrier.requirement for carrier in CARRIERS.values() if carrier.needs_cuda),
            fix=_ways_out(found, DEFAULT_V2),
        )
    carrier = CARRIERS[found.carriers[0]]
    if carrier.name == MEGATRONS_OWN and not managed:
        return Choice("megatron", f"{found.describe()}; without V2, Megatron's own path stays as it is")
    _check_generation(found, carrier.name)
    return Choice(carrier.name, f"{found.describe()}; {carrier.advantage}")


def _check_generation(found: Probe, carrier: str) -> None:
    """Refuse a generation that has the carrier's class and that this package does not carry: deep_ep 2.0."""
    package, fault = found.package_of(carrier), _fault(found, carrier)
    if package is not None and fault:
        raise UnavailableError(
            f"{package.describe()} is of a generation that this package does not carry",
            found=f"generation {package.generation}: {fault}",
            needed=CARRIERS[carrier].requirement,
            fix=_ways_out(found, carrier),
        )


def _fault(found: Probe, carrier: str) -> str | None:
    """Why this package does not carry the generation of a carrier of V2; None = it does."""
    package = found.package_of(carrier)
    if package is None or package.generation is None or not CARRIERS[carrier].is_v2:
        return None
    return GENERATIONS[package.generation].fault


def _ways_out(found: Probe, carrier: str) -> str:
    """Fix of an error about a missing carrier: the wheel to install, or the reference on purpose. Never what is
    installed and refused."""
    generation = CARRIERS[carrier].generation
    generation = generation if generation in WITH_WHEELS else CARRIERS[DEFAULT_V2].generation
    assert generation is not None
    install = f"install DeepEP {generation}: {install_command(generation, torch.__version__)}"
    if any(package.failure for package in found.packages):
        install = "`python -m megatron_ep_v2 doctor` says why the import fails, and what to install"
    elif found.packages:
        install = install.replace(": ", ", in an environment without another DeepEP: ", 1)
    others = [name for name in found.carriers if name != carrier and CARRIERS[name].is_v2]
    if found.cuda and others and not _fault(found, others[0]):
        install = f"leave the setting buffer at auto, which takes {others[0]}; or {install}"
    return f"{install}; or, to run the slow reference on purpose, set MCORE_DEEPEP_V2_BUFFER=reference"


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
