"""`patches/` and `python -m megatron_ep_v2 patch`: what a patch changes, and what a patched Megatron does."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

from megatron_ep_v2.cli import patch as command
from megatron_ep_v2.cli.patch import find, installed_megatron, patch
from megatron_ep_v2.errors import SeamError, SettingsError
from tests.helpers.harness import HANG
from tests.helpers.paths import JOBS, ROOT

FILES = sorted((ROOT / "patches").glob("*.patch"))
CHANGED = Path("megatron/core/transformer/moe/moe_layer.py")
# One stack has the oldest version, the other one all that need its Python.
VERSIONS = ["0.16.1"] if sys.version_info < (3, 12) else ["0.17.1", "0.18.2", "0.19.2"]


def tree(folder: Path, content: bytes | None = None) -> Path:
    """A Megatron of one file: the installed one's, or this content."""
    (folder / CHANGED).parent.mkdir(parents=True)
    (folder / CHANGED).write_bytes((installed_megatron() / CHANGED).read_bytes() if content is None else content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def python(*arguments: str, path: tuple[Path, ...], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """On the CPU, with these folders first on its path and no settings of this package."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MCORE_DEEPEP_V2_")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["MCORE_DEEPEP_V2_REFERENCE_STRICT"] = "off"  # a small layer in fp32
    done = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(done, cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANG, check=False)


def job(mode: str, *path: Path) -> list[dict[str, Any]]:
    """What each rank of tests/jobs/patched_layer.py reports."""
    done = python(str(JOBS / "patched_layer.py"), mode, path=(*path, ROOT))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------- what is in a patch


def test_there_are_few_patches() -> None:
    assert len(FILES) == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_patch_is_well_formed(file: Path) -> None:
    """One file, line counts as its headers say, a line of context on either side, nothing taken away."""
    lines = file.read_text().splitlines(keepends=True)
    assert lines[:2] == [f"--- a/{CHANGED}\n", f"+++ b/{CHANGED}\n"]
    (hunk,) = [i for i, line in enumerate(lines) if line.startswith("@@")]
    body = lines[hunk + 1 :]
    signs = "".join(line[0] for line in body)
    added = signs.count("+")
    assert signs == " " + "+" * added + " " and all(line.endswith("\n") for line in body)
    first = lines[hunk].split()[1].removeprefix("-").split(",")[0]
    assert lines[hunk] == f"@@ -{first},2 +{first},{2 + added} @@\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_patch_touches_only_the_intended_names(file: Path) -> None:
    added = "".join(line[1:] for line in file.read_text().splitlines(keepends=True)[2:] if line.startswith("+"))
    nodes = list(ast.walk(ast.parse(textwrap.dedent(added))))
    assert {node.id for node in nodes if isinstance(node, ast.Name)} == {
        "config",
        "find_spec",
        "megatron_ep_v2",
        "self",
    }
    imported = {alias.name for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for alias in n.names}
    assert imported == {"find_spec", "megatron_ep_v2"}
    assert not [node for node in nodes if isinstance(node, (ast.AugAssign, ast.Delete, ast.Try))]
    (assignment,) = [node for node in nodes if isinstance(node, ast.Assign)]
    assert ast.unparse(assignment) == "self.submodules = megatron_ep_v2.moe_submodules(self.submodules)"


def test_only_the_moe_layers_constructor_changes(tmp_path: Path) -> None:
    def functions(content: bytes) -> dict[str, str]:
        return {
            f"{owner.name}.{getattr(node, 'name', ast.unparse(node))}": ast.dump(node)
            for owner in ast.parse(content).body
            for node in (owner.body if isinstance(owner, ast.ClassDef) else [])
        }

    before = (tree(tmp_path) / CHANGED).read_bytes()
    assert patch(["apply", str(tmp_path)]) == 0
    before_functions, after_functions = functions(before), functions((tmp_path / CHANGED).read_bytes())
    assert before_functions.keys() == after_functions.keys()
    changed = [name for name in before_functions if before_functions[name] != after_functions[name]]
    assert changed == ["MoELayer.__init__"]


# ------------------------------------------------------------------------------------------------- the released wheels


def wheel(version: str, folder: Path) -> Path:
    """The released wheel for this Python, from the registry, or kept from an earlier run."""
    pattern = f"megatron_core-{version}-cp{sys.version_info[0]}{sys.version_info[1]}-*.whl"
    if not list(folder.glob(pattern)):
        download = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        done = python(*download, f"megatron-core=={version}", path=())
        assert done.returncode == 0, done.stderr
    (file,) = folder.glob(pattern)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_released_megatron(version: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Apply, train a layer without a call of install(), revert to the same bytes."""
    cache = request.config.cache
    assert cache is not None
    with zipfile.ZipFile(wheel(version, cache.mkdir("wheels"))) as archive:
        archive.extractall(tmp_path)
    before = contents(tmp_path)
    assert patch(["check", str(tmp_path)]) == 1
    assert patch(["apply", str(tmp_path)]) == 0
    assert patch(["check", str(tmp_path)]) == 0
    assert {name for name, content in contents(tmp_path).items() if before.get(name) != content} == {str(CHANGED)}

    for report in job("with", tmp_path):
        assert report == {
            "file": str(tmp_path / CHANGED),
            "another backend": [False, None, None],
            "a wrong setting": "the setting layout (layout of the rows that the experts get) cannot be 'sorted'",
            "alone": [True, "reference", "expanded"],
            "after install()": [True, "reference", "compact"],
            "after uninstall()": [True, "reference", "expanded"],  # bound again with the next layer
            "experts": ["GroupedExperts", "GroupedExperts", "SequentialMLP"],
        }
    for cached in tmp_path.rglob("__pycache__"):
        shutil.rmtree(cached)
    assert patch(["revert", str(tmp_path)]) == 0
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_without_the_package_a_patched_megatron_is_stock(tmp_path: Path) -> None:
    """The same error without deep_ep; with a legacy one the same calls, outputs and gradients, bit for bit."""
    shutil.copytree(installed_megatron() / "megatron", tmp_path / "megatron")
    assert patch(["apply", str(tmp_path)]) == 0
    stock, patched = job("without"), job("without", tmp_path)
    for reports, root in ((stock, installed_megatron()), (patched, tmp_path)):
        assert {report.pop("file") for report in reports} == {str(root / CHANGED)}
    assert stock[0]["legacy deep_ep"]["manager"].endswith("token_dispatcher._DeepepManager")
    assert patched == stock


# -------------------------------------------------------------------------------------------------------- the command


def test_apply_check_revert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tree(tmp_path))
    file = tmp_path / CHANGED
    file.chmod(0o640)
    before = contents(tmp_path)

    def run(action: str) -> tuple[int, str]:
        code = patch([action, root])
        out = capsys.readouterr().out
        assert out.startswith("megatron-core.patch ") and out.endswith(f" {file.resolve()}\n")
        return code, out.removeprefix("megatron-core.patch ").removesuffix(f" {file.resolve()}\n")

    assert run("check") == (1, "fits, but is not applied to")
    assert run("revert") == (0, "fits, but is not applied to")
    assert contents(tmp_path) == before
    assert run("apply") == (0, "is now applied to")
    after = contents(tmp_path)
    assert b"megatron_ep_v2.moe_submodules(" in after[str(CHANGED)]
    assert run("check") == run("apply") == (0, "is applied to")
    assert contents(tmp_path) == after, "a second time it changes nothing"
    assert run("revert") == (0, "is no longer applied to")
    assert contents(tmp_path) == before and file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_the_usual_tools_do_the_same(tool: str, tmp_path: Path) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"there is no {tool} here")
    ours, theirs = tree(tmp_path / "ours"), tree(tmp_path / "theirs")
    before = contents(theirs)
    assert patch(["apply", str(ours)]) == 0
    apply, revert = {
        "git": (["git", "apply"], ["git", "apply", "--reverse"]),
        "patch": (["patch", "-p1", "-F0", "-i"], ["patch", "-p1", "-F0", "-R", "-i"]),
    }[tool]
    subprocess.run([*apply, str(FILES[0])], cwd=theirs, check=True, capture_output=True, timeout=HANG)
    assert (theirs / CHANGED).read_bytes() == (ours / CHANGED).read_bytes()
    assert find(theirs).applied
    subprocess.run([*revert, str(FILES[0])], cwd=theirs, check=True, capture_output=True, timeout=HANG)
    assert (theirs / CHANGED).read_bytes() == before[str(CHANGED)]


HOOK = b"                self.submodules = megatron_ep_v2.moe_submodules(self.submodules)\n"
REFUSED = {
    "no file": (lambda before, after: None, f"there is no {CHANGED}"),
    "other text": (lambda before, after: before.replace(b"super(MoELayer, self)", b"super()"), "lines"),
    "twice": (lambda before, after: before + before, "exactly once"),
    "windows": (lambda before, after: before.replace(b"\n", b"\r\n"), "lines that it changes"),
    "edited hook": (lambda before, after: after.replace(HOOK, HOOK.replace(b")", b", 8)")), "already names"),
    "half a hook": (lambda before, after: after.replace(HOOK, b""), "already names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_no_patch_fits(case: str, tmp_path: Path) -> None:
    before = (tree(tmp_path) / CHANGED).read_bytes()
    assert patch(["apply", str(tmp_path)]) == 0
    change, reason = REFUSED[case]
    content = change(before, (tmp_path / CHANGED).read_bytes())
    if content is None:
        (tmp_path / CHANGED).unlink()
    else:
        (tmp_path / CHANGED).write_bytes(content)
    changed = contents(tmp_path)
    for action in ("apply", "revert", "check"):
        with pytest.raises(SeamError, match="no patch fits") as caught:
            patch([action, str(tmp_path)])
        assert reason in str(caught.value.found) and "nothing was changed" in str(caught.value)
        assert caught.value.needed and caught.value.fix
        assert contents(tmp_path) == changed


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(tree(tmp_path))

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(command.os, "replace", refuse)
    with pytest.raises(SettingsError, match="cannot write") as caught:
        patch(["apply", str(tmp_path)])
    assert "Permission denied" in str(caught.value)
    assert contents(tmp_path) == before, "no half-written file either"


def test_a_file_that_an_installer_shares_with_its_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache.py"
    os.link(tree(tmp_path / "site") / CHANGED, cache)
    before = cache.read_bytes()
    assert patch(["apply", str(tmp_path / "site")]) == 0
    assert cache.read_bytes() == before


@pytest.mark.parametrize("arguments", [[], ["undo"], ["apply", "here", "there"], ["check", "nowhere"]], ids=str)
def test_a_command_that_cannot_be_done(arguments: list[str], tmp_path: Path) -> None:
    done = python("-m", "megatron_ep_v2", "patch", *arguments, path=(ROOT,), cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "\n  needed: " in done.stderr and "\n  fix: " in done.stderr and "Traceback" not in done.stderr


def test_the_installed_megatron_is_the_default(tmp_path: Path) -> None:
    done = python("-m", "megatron_ep_v2", "patch", "check", path=(ROOT,), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f"megatron-core.patch fits, but is not applied to {installed_megatron() / CHANGED}\n"
    done = python("-m", "megatron_ep_v2", "patch", "check", path=(tree(tmp_path), ROOT), cwd=tmp_path)
    assert done.returncode == 1, "a Megatron of one file has no megatron.core to import"
    (tmp_path / "megatron" / "core" / "__init__.py").touch()
    done = python("-m", "megatron_ep_v2", "patch", "apply", path=(tmp_path, ROOT))
    assert done.stdout == f"megatron-core.patch is now applied to {tmp_path.resolve() / CHANGED}\n", done.stderr


def test_an_installed_package_has_its_patches(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    done = python("setup.py", "-q", "build_py", "--build-lib", str(tmp_path), path=(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    done = python("-m", "megatron_ep_v2", "patch", "check", path=(tmp_path,), cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.startswith("megatron-core.patch fits"), done.stderr
