"""Imports point one way, and importing does nothing else. Read from the sources, so that lazy imports count too."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_ep_v2
from megatron_ep_v2.generations import PACKAGES
from tests.helpers.harness import HANG

PACKAGE = "megatron_ep_v2"
ROOT = Path(megatron_ep_v2.__file__).parent

# A module may import those above it. Modules of one line may import each other, but not in a circle.
LEVELS = [
    {"errors", "graphs", "versions", "buffers.carriers", "wire.formats"},  # no torch
    {"settings", "streams", "generations", "buffers.groups"},
    {"buffers.pending"},
    {"cuda_toolkit", "gpus"},
    {"probe", "device_checks", "buffers.contract", "buffers.gin", "megatron.symbols"},
    {"gradients"},
    {"kernels", "kernels.*"},
    {"wire", "wire.*"},
    {"watchdog", "watchdog.*"},
    {"buffers", "buffers.*"},
    {"recompute", "layouts", "layouts.*", "balance", "balance.*"},
    {"fused_a2a", "watchdog.stragglers", "experts", "experts.*"},
    {"started_a2a"},
    {"sync_free", "serving", "serving.*"},
    {"megatron", "megatron.*"},
    {"", "auto", "experts.module"},  # the package's __init__, and an old name
    {"bench", "bench.*", "doctor", "doctor.*"},
    {"cli", "cli.*"},
    {"__main__"},
]
# Modules that import by a name which the source does not spell, and what.
LOADS = {
    "probe": "the packages of DeepEP, and nothing else does",
    "buffers.pool": "the wrapper of a carrier",
    "kernels.select": "our Triton kernels",
    "megatron.experts": "Megatron's and TransformerEngine's experts",
    "megatron.symbols": "Megatron",
    "__main__": "a command",
}
MAY_READ_ENVIRONMENT = {"settings"}


def module_name(path: Path) -> str:
    """Below the package: "buffers.pool"; the package itself is ""."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): ast.parse(path.read_text(), str(path)) for path in sorted(ROOT.rglob("*.py"))}


def level(module: str) -> int:
    group = module.split(".")[0] + ".*"
    for name in (module, group):
        for i, names in enumerate(LEVELS):
            if name in names:
                return i
    raise AssertionError(f"{module} is new: put it into LEVELS")


def imported(tree: ast.Module, module: str) -> Iterator[str]:
    """Full names of everything that a source imports, by statement or through importlib with a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def own_imports(module: str) -> set[str]:
    """The modules of this package that `module` imports."""
    found = set()
    for name in imported(SOURCES[module], module):
        parts = name.split(".")
        if parts[0] == PACKAGE:
            inside = ".".join(parts[1:])
            found.add(inside if inside in SOURCES else ".".join(parts[1:-1]))
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module: str) -> None:
    for other in own_imports(module):
        same_folder = module.split(".")[0] == other.split(".")[0] and level(module) == level(other)
        assert level(other) < level(module) or same_folder, f"{module or '__init__'} must not import {other or PACKAGE}"


def test_imports_make_no_circle() -> None:
    order = graphlib.TopologicalSorter({module: own_imports(module) for module in SOURCES}).static_order()
    assert set(order) >= set(SOURCES)


def importers(package: str) -> set[str]:
    return {module for module, tree in SOURCES.items() if package in {i.split(".")[0] for i in imported(tree, module)}}


def test_only_the_probe_loads_deep_ep() -> None:
    """Others ask it for a class (`load_class`)."""
    assert {module for package in PACKAGES for module in importers(package)} == set()
    loaders = set()
    for module, tree in SOURCES.items():
        for node in ast.walk(tree):
            called = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and not isinstance(node.args[0], ast.Constant):
                loaders.add(module)
    assert loaders == set(LOADS)


def test_only_the_folder_megatron_imports_megatron() -> None:
    assert not {module for module in importers("megatron") if not module.startswith("megatron.")}


def test_only_the_settings_read_the_environment() -> None:
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    readers = set()
    for module, tree in SOURCES.items():
        for node in ast.walk(tree):
            attribute = isinstance(node, ast.Attribute) and node.attr in names
            imports = isinstance(node, ast.ImportFrom) and node.module == "os"
            if attribute or (imports and names & {alias.name for alias in node.names}):
                readers.add(module)
    assert readers <= MAY_READ_ENVIRONMENT


WITNESS = """
import json, os, sys
before = dict(os.environ)
import {module}
torch = sys.modules.get("torch")
print(json.dumps({{
    "changed environment": sorted(set(before.items()) ^ set(os.environ.items())),
    "packages": sorted({{"deep_ep", "deep_ep_v25", "megatron"}} & set(sys.modules)),
    "cuda": bool(torch) and torch.cuda.is_initialized(),
    "group": bool(torch) and torch.distributed.is_available() and torch.distributed.is_initialized(),
    "torch": bool(torch),
}}))
"""


def witness(module: str) -> dict[str, object]:
    """What importing a module changes in a new interpreter."""
    command = [sys.executable, "-c", WITNESS.format(module=module)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_package_does_nothing() -> None:
    nothing = {"changed environment": [], "packages": [], "cuda": False, "group": False, "torch": False}
    assert witness(PACKAGE) == nothing


@pytest.mark.parametrize("module", ["__main__", "auto"])
def test_importing_what_starts_first_touches_nothing(module: str) -> None:
    """Not even torch: the doctor must speak where torch cannot be imported, and auto is imported by interpreters that
    may never need it."""
    nothing = {"changed environment": [], "packages": [], "cuda": False, "group": False, "torch": False}
    assert witness(f"{PACKAGE}.{module}") == nothing


@pytest.mark.slow
def test_importing_the_binding_touches_nothing_yet() -> None:
    """It imports all modules but those that need Megatron."""
    nothing = {"changed environment": [], "packages": [], "cuda": False, "group": False, "torch": True}
    assert witness(f"{PACKAGE}.megatron.binding") == nothing
