"""What is installed: the files of sdist and wheel, their metadata, and the names of the command.

`make wheel-check` installs the wheel and uses it; here it is only built and looked at.
"""

from __future__ import annotations

import email.message
import email.parser
import fnmatch
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megatron_ep_v2
from megatron_ep_v2 import __main__ as program
from tests.helpers.harness import HANG
from tests.helpers.paths import ROOT

NAME = f"megatron_ep_v2-{megatron_ep_v2.__version__}"
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # each of them writes its own sys.argv
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""


def files_in(folder: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with sdist and wheel, of a copy of the tree: a build writes next to what it builds."""
    pytest.importorskip("setuptools", minversion="77")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for name in ("benchmarks", "examples", "megatron_ep_v2", "patches", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl")


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    return email.parser.BytesParser().parsebytes(wheel.read(f"{NAME}.dist-info/METADATA"))


def test_the_wheel_has_the_package_the_patches_and_the_example_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
    patches, example = files_in("patches"), {name for name in files_in("examples") if name.endswith(".py")}
    example -= files_in("examples/configs")
    assert patches and "examples/pretrain_qwen3_moe.py" in example and "megatron_ep_v2/py.typed" in files
    assert files == files_in("megatron_ep_v2") | {f"megatron_ep_v2/{name}" for name in patches | example}
    for name in patches | example:
        assert wheel.read(f"megatron_ep_v2/{name}") == (ROOT / name).read_bytes()


def test_the_sdist_has_what_a_wheel_is_built_from(built: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive if member.isfile()}
    names = {name for name in names if ".egg-info/" not in name}
    head = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"}
    example = {name for name in files_in("examples") if name.endswith(".py")} - files_in("examples/configs")
    assert names == head | files_in("megatron_ep_v2") | files_in("patches") | example


@pytest.mark.parametrize(
    ("device", "is_one"), [("nvidia0", True), ("nvidia7", True), ("nvidiactl", False), ("nvidia-uvm", False)]
)
def test_make_sees_any_gpu(device: str, is_one: bool) -> None:
    """A container may have been given the last one of its host alone."""
    (pattern,) = re.findall(r"^DEEPEP .*wildcard /dev/([^)]+)\)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert fnmatch.fnmatchcase(device, pattern) is is_one


def test_the_image_has_the_files_that_its_dependencies_are_read_from(tmp_path: Path) -> None:
    """Its first installation sees only what was copied before it, and setuptools wants the folder of each package."""
    pytest.importorskip("setuptools", minversion="77")
    before, _, _ = (ROOT / "docker" / "Dockerfile").read_text().partition("RUN grep")
    for names, target in re.findall(r"^COPY (.+) (\S+)$", before, re.MULTILINE):
        for name in names.split():
            copy = tmp_path / target / (name if target == "./" else "")
            copy.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy)
    command = [sys.executable, "-c", "from setuptools import build_meta\nbuild_meta.build_wheel('.')"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_metadata(metadata: email.message.Message) -> None:
    wanted = {"Name": "megatron_ep_v2", "Version": megatron_ep_v2.__version__, "License-Expression": "Apache-2.0"}
    wanted |= {"Requires-Python": ">=3.10", "License-File": "LICENSE", "Description-Content-Type": "text/markdown"}
    assert {name: metadata[name] for name in wanted} == wanted
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert metadata.get_all("Provides-Extra") == ["megatron", "deepep", "deepep25", "example", "test", "lint", "dev"]
    needed = metadata.get_all("Requires-Dist")
    assert [line for line in needed if "extra ==" not in line] == ["torch>=2.4"]
    everything = [Requirement(line).extras for line in needed if 'extra == "dev"' in line]
    assert everything == [{"megatron", "example", "test", "lint"}]


def test_the_console_script_is_the_program(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert text.split("\n", 1)[0] == "[console_scripts]"
    assert text.split("\n", 1)[1].strip() == f"megatron-ep-v2 = {program.__name__}:{program.main.__name__}"


@pytest.mark.parametrize(
    ("started_as", "name"),
    [
        ("/opt/venv/bin/megatron-ep-v2", "megatron-ep-v2"),
        ("/opt/venv/lib/python3.12/site-packages/megatron_ep_v2/__main__.py", "python -m megatron_ep_v2"),
    ],
    ids=["script", "module"],
)
def test_usage_names_the_program_as_it_was_started(
    started_as: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [started_as, *arguments])
        with pytest.raises(SystemExit) as ended:
            program.main()
            raise SystemExit
        out, err = capsys.readouterr()
        return f"{out}{err}{ended.value.code}"

    assert said("--help").startswith(f"usage: {name} COMMAND")
    assert f"usage: {name} COMMAND" in said("nonsense")
    assert f"usage: {name} COMMAND" in said("patch")
    assert said("doctor", "--help").startswith(f"usage: {name} doctor [")
    assert said("bench", "--help").startswith(f"usage: {name} bench [")
