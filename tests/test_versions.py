"""`versions.py` is the home of the versions that this package needs: files that have to repeat them say the same."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from megatron_ep_v2 import versions
from megatron_ep_v2.generations import nccl_command

ROOT = Path(__file__).parents[1]
OLDEST, NEWEST = versions.MEGATRON_CORE.split(" to ")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "examples").rglob("*.sh"))


def text(name: str) -> str:
    return (ROOT / name).read_text()


def series(version: str) -> str:
    return version.rpartition(".")[0]


def test_the_series_are_those_of_the_versions() -> None:
    assert f"{series(OLDEST)} to {series(NEWEST)}" == versions.MEGATRON_CORE_SERIES


def test_the_constraints_pin_both_ends() -> None:
    assert re.findall(r"^megatron-core==(\S+)", text("constraints.txt"), re.MULTILINE) == [OLDEST, NEWEST]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_metadata_asks_for_them() -> None:
    import tomllib

    project = tomllib.loads(text("pyproject.toml"))["project"]
    major, minor = map(int, series(NEWEST).split("."))
    assert project["requires-python"] == f">={versions.PYTHON}"
    assert project["dependencies"] == [f"torch>={versions.TORCH}"]
    assert project["optional-dependencies"]["megatron"] == [f"megatron-core>={OLDEST},<{major}.{minor + 1}"]


def test_the_extras_for_gpus_are_the_first_wheels_of_each_generation() -> None:
    import tomllib

    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    for extra, (generation, *compiler) in zip(("deepep", "deepep25"), versions.NVCC_WHEELS, strict=True):
        distribution, version, torch = next(row[1:4] for row in versions.WHEELS if row[0] == generation)
        wanted = [f"{distribution}=={version}", f"torch=={torch}", *compiler]
        assert extras[extra] == wanted


@pytest.mark.parametrize("file", ["README.md", "docs/compatibility.md", "Makefile", "docker/Dockerfile"])
def test_what_replaces_torchs_wheels_is_the_same_everywhere(file: str) -> None:
    override = f"--no-deps {nccl_command('2.5').rpartition(' ')[2]} '{versions.CUDA_RUNTIME_25}'"
    assert override in text(file)


def test_the_makefile_asks_for_the_same_python() -> None:
    assert f"sys.version_info < ({versions.PYTHON.replace('.', ', ')})" in text("Makefile")
    assert f"needs {versions.PYTHON} or newer" in text("Makefile")


def test_the_image_takes_the_extras() -> None:
    file = text("docker/Dockerfile")
    assert "ARG EXTRA=deepep\n" in file and '".[megatron,$EXTRA]"' in file and "--build-arg EXTRA=deepep25" in file
    assert (
        "grep -vE '^(torch|triton)=' constraints.txt" in file
        and "grep -vE '^(torch|triton)=' constraints.txt" in text("Makefile")
    )


def test_the_image_replaces_torchs_wheels_last() -> None:
    """pip takes back a replaced wheel when it next installs something that needs torch."""
    steps = [line for line in text("docker/Dockerfile").splitlines() if "pip install" in line]
    replaces = next(number for number, step in enumerate(steps) if versions.CUDA_RUNTIME_25 in step)
    assert all("--no-deps" in step for step in steps[replaces:]) and "transformer_engine" in "".join(steps[:replaces])


def test_the_table_of_what_was_tested_has_them() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text("docs/compatibility.md").splitlines()]
    first = {row[0]: row[1] for row in reversed(rows) if len(row) == 4}
    assert first["deep_ep"].startswith(versions.DEEP_EP_V2)
    assert first["NCCL"].startswith(versions.NCCL)
    assert any(row[1].startswith(versions.NCCL_25) and "2.5" in row[3] for row in rows if len(row) == 4)
    assert first["Megatron-Core"].startswith(NEWEST)
    on_cpu = {row[1]: row[2] for row in rows if len(row) == 5 and row[4] == "the whole suite, in CI"}
    pinned = re.findall(r"^torch==(\S+)", text("constraints.txt"), re.MULTILINE)
    assert on_cpu == dict(zip([OLDEST, NEWEST], pinned, strict=True))


def test_the_table_of_wheels_has_them() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text("docs/compatibility.md").splitlines()]
    table = [tuple(row[:4]) for row in rows if len(row) == 6 and row[1].startswith("`")]
    wanted = []
    for generation, distribution, version, torch, nccl in versions.WHEELS:
        needed = {None: "torch's own"}.get(nccl, (nccl or "").replace("==", "").replace(">=", "from "))
        wanted.append((generation, f"`{distribution}=={version}`", torch, needed))
    assert table == wanted


@pytest.mark.parametrize("file", [*PAGES, *CONFIGS], ids=lambda file: file.name)
def test_every_range_of_releases_that_a_text_names_is_the_tested_one(file: Path) -> None:
    assert set(re.findall(r"0\.\d+\.\d+ to 0\.\d+\.\d+", file.read_text())) <= {versions.MEGATRON_CORE}


def test_contributing_names_both_stacks() -> None:
    assert re.findall(r"Python 3\.\d+ with megatron-core (\S+\d)", text("CONTRIBUTING.md")) == [OLDEST, NEWEST]


def test_no_message_of_the_package_spells_them_out() -> None:
    """In docstrings and comments a version is where something was read, which stays true."""
    values = [value for name, value in vars(versions).items() if name.isupper() and value.count(".") > 1]
    spelt = []
    for path in sorted((ROOT / "megatron_ep_v2").rglob("*.py")):
        if path.name == "versions.py":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                spelt += [(path.name, value) for value in values if value in node.value]
    assert spelt == []
