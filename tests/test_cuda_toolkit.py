"""Which CUDA toolkit DeepEP compiles with: the one that it finds, unless only pip's can."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from megatron_ep_v2 import cuda_toolkit, probe
from megatron_ep_v2.generations import GENERATIONS

VARIABLES = ("CUDA_HOME", "CUDA_PATH", "EP_JIT_NVCC_COMPILER", "DJ_JIT_NVCC_COMPILER")


def toolkit(home: Path, version: str, cuobjdump: bool = True) -> Path:
    """A folder with an nvcc that says this version."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    nvcc.chmod(0o755)
    if cuobjdump:
        (home / "bin" / "cuobjdump").touch()
    return home


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without a toolkit of its own; site/ is its site-packages."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(cuda_toolkit, "SYSTEM", tmp_path / "system")
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *(p for p in sys.path if "-packages" not in p)])
    return tmp_path


def pips(host: Path, version: str, cuobjdump: bool = True) -> str:
    return str(toolkit(host / "site" / "nvidia" / "cu13", version, cuobjdump))


@pytest.mark.parametrize(
    ("package", "system", "of_pip", "taken"),
    [
        ("deep_ep", None, "13.0", True),
        ("deep_ep", "13.0", "13.0", False),
        ("deep_ep", "12.4", "13.0", True),  # no compiler for SM 10.0
        ("deep_ep", None, "12.4", False),
        ("deep_ep_v25", "13.0", "13.1", True),
        ("deep_ep_v25", "13.1", "13.1", False),
        ("deep_ep_v25", None, "13.0", False),
        ("deep_ep", None, None, False),
    ],
)
def test_pips_toolkit_is_taken_where_the_hosts_does_not_serve(
    host: Path, package: str, system: str | None, of_pip: str | None, taken: bool
) -> None:
    if system:
        toolkit(host / "system", system)
    ours = pips(host, of_pip) if of_pip else None
    cuda_toolkit.provide(package)
    assert os.environ.get("CUDA_HOME") == (ours if taken else None)


@pytest.mark.parametrize(("package", "taken"), [("deep_ep", False), ("deep_ep_v25", True)])
def test_2_1_needs_cuobjdump_and_2_5_does_not(host: Path, package: str, taken: bool) -> None:
    ours = pips(host, "13.1", cuobjdump=False)
    cuda_toolkit.provide(package)
    assert os.environ.get("CUDA_HOME") == (ours if taken else None)


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH", "EP_JIT_NVCC_COMPILER"])
def test_what_the_user_named_stays(host: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pips(host, "13.1")
    monkeypatch.setenv(name, "/nowhere")
    before = {each: os.environ.get(each) for each in VARIABLES}
    cuda_toolkit.provide("deep_ep_v25")
    assert {each: os.environ.get(each) for each in VARIABLES} == before


def test_it_is_set_before_the_import_of_deep_ep(host: Path) -> None:
    """DeepEP reads it once, when it is imported."""
    ours = pips(host, "13.1")
    package = host / "site" / "deep_ep_v25"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nclass EPBuffer: pass\n__version__ = os.environ['CUDA_HOME']\n")
    try:
        found = probe.look_at("deep_ep_v25")
    finally:
        sys.modules.pop("deep_ep_v25", None)
    assert found is not None and found.version == ours and found.generation == "2.5"


def test_without_deep_ep_no_compiler_is_asked(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pips(host, "13.1")
    monkeypatch.setattr(cuda_toolkit, "provide", lambda package: pytest.fail(f"{package} is not installed"))
    assert probe.look_at("deep_ep_v25") is None
    assert "CUDA_HOME" not in os.environ


def test_what_deep_ep_finds_is_what_its_variables_say(host: Path) -> None:
    system = toolkit(host / "system", "12.9")
    named = toolkit(host / "named", "13.1")
    row = GENERATIONS["2.1"]
    assert cuda_toolkit.found_by_deep_ep({}, row).version == "12.9"
    assert cuda_toolkit.found_by_deep_ep({"CUDA_PATH": str(named)}, row).home == named
    compiler = {"EP_JIT_NVCC_COMPILER": str(named / "bin" / "nvcc")}
    found = cuda_toolkit.found_by_deep_ep(compiler, row)
    assert (found.home, found.version) == (system, "13.1")
