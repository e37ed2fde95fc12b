"""Which CUDA toolkit DeepEP compiles with: the one that it finds, unless only pip's can."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ep_v2 import cuda_toolkit, probe
from megatron_ep_v2.generations import GENERATIONS, PACKAGES
from tests.helpers.harness import HANG
from tests.helpers.paths import PYTHONPATH

VARIABLES = ("CUDA_HOME", "CUDA_PATH", "EP_JIT_NVCC_COMPILER", "DJ_JIT_NVCC_COMPILER")


def toolkit(home: Path, version: str, cuobjdump: str | None = "13.4") -> Path:
    """A folder with programs that say these versions."""
    (home / "bin").mkdir(parents=True)
    for name, said in (("nvcc", version), ("cuobjdump", cuobjdump)):
        if said:
            (home / "bin" / name).write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {said}, V{said}.88'\n")
            (home / "bin" / name).chmod(0o755)
    return home


def install(host: Path, package: str) -> None:
    """A package that keeps the CUDA_HOME of its import."""
    classes = {"deep_ep": "class Buffer: pass", "deep_ep_v25": "class EPBuffer: pass"}
    (host / "site" / f"{package}.py").write_text(
        f"import os\n{classes[package]}\n__version__ = os.environ.get('CUDA_HOME')\n"
    )


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A host without a toolkit of its own; site/ is its site-packages."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(cuda_toolkit, "SYSTEM", tmp_path / "system")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nvidia", *PACKAGES)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(cuda_toolkit, "provided", None)
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *(p for p in sys.path if "-packages" not in p)])
    yield tmp_path
    for name in PACKAGES:
        sys.modules.pop(name, None)


def pips(host: Path, version: str, cuobjdump: str | None = "13.4") -> str:
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
    install(host, package)
    cuda_toolkit.provide()
    assert os.environ.get("CUDA_HOME") == (ours if taken else None)


@pytest.mark.parametrize(
    ("package", "cuobjdump", "taken"),
    [("deep_ep", None, False), ("deep_ep", "13.5", False), ("deep_ep_v25", None, True), ("deep_ep_v25", "13.5", True)],
)
def test_2_1_needs_a_cuobjdump_that_it_understands_and_2_5_needs_none(
    host: Path, package: str, cuobjdump: str | None, taken: bool
) -> None:
    ours = pips(host, "13.1", cuobjdump)
    install(host, package)
    cuda_toolkit.provide()
    assert os.environ.get("CUDA_HOME") == (ours if taken else None)


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH", "EP_JIT_NVCC_COMPILER"])
def test_what_the_user_named_stays(host: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pips(host, "13.1")
    install(host, "deep_ep_v25")
    monkeypatch.setenv(name, "/nowhere")
    before = {each: os.environ.get(each) for each in VARIABLES}
    cuda_toolkit.provide()
    assert {each: os.environ.get(each) for each in VARIABLES} == before


def test_it_is_set_before_the_import_of_deep_ep(host: Path) -> None:
    """DeepEP reads it once, when it is imported."""
    ours = pips(host, "13.1")
    install(host, "deep_ep_v25")
    found = probe.look_at("deep_ep_v25")
    assert found is not None and found.version == ours and found.generation == "2.5"


MEGATRON = """
import {first}
import megatron.core.transformer.moe.token_dispatcher
import deep_ep
print(deep_ep.__version__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["megatron_ep_v2.auto", "megatron_ep_v2.megatron.qwen3_moe.model"])
def test_it_is_set_before_megatron_imports_deep_ep(host: Path, first: str) -> None:
    """Seen with deep_ep 2.1 on a host without a toolkit: Megatron's import ended with deep_ep's assertion."""
    ours = pips(host, "13.1")
    install(host, "deep_ep")
    path = os.pathsep.join([str(host / "site"), PYTHONPATH])
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HOME": str(host)}
    command = [sys.executable, "-c", MEGATRON.format(first=first)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.stdout.strip() == ours, done.stderr[-2000:]


def test_a_stand_in_for_nvidias_packages_hides_nothing(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests and documentation builds put modules without a spec into sys.modules."""
    ours = pips(host, "13.1")
    install(host, "deep_ep_v25")
    monkeypatch.setitem(sys.modules, "nvidia", types.ModuleType("nvidia"))
    cuda_toolkit.provide()
    assert os.environ.get("CUDA_HOME") == ours


@pytest.mark.parametrize("script", ["exit 0", "exit 1", r"printf '\377release 13.1, V'", "kill $$"])
def test_a_compiler_that_says_nothing_of_use(host: Path, script: str) -> None:
    nvcc = Path(pips(host, "13.1")) / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    install(host, "deep_ep_v25")
    cuda_toolkit.provide()
    assert os.environ.get("CUDA_HOME") in (None, str(nvcc.parent.parent))


def test_each_compiler_is_asked_once(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` asks before each import of a module of Megatron; a compiler on a slow disk would be started for each."""
    toolkit(host / "system", "13.1")
    pips(host, "13.1")
    install(host, "deep_ep_v25")
    asked: list[str] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: asked.append(command[0]) or run(command, **more))
    for _ in range(3):
        cuda_toolkit.provide()
    assert "CUDA_HOME" not in os.environ and sorted(asked) == sorted(set(asked))


def test_without_deep_ep_no_compiler_is_asked(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pips(host, "13.1")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: pytest.fail(f"{command} was run"))
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
