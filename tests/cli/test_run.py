"""`python -m megatron_ep_v2 run SCRIPT ARGS...` in processes of its own, as users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import launched, python
from tests.helpers.harness import HANG
from tests.helpers.paths import ROOT

# What a script sees; the same text runs as a script and as a module.
WITNESS = """
import json, sys
import neighbour
import megatron_ep_v2
seen = {
    "name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path[0], "status": megatron_ep_v2.status(),
    "is main": vars(sys.modules["__main__"]) is globals(),
}
"""


def run(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """`python -m megatron_ep_v2 arguments` in a new interpreter, on the CPU."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MCORE_DEEPEP_V2_")}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", **variables}
    command = [sys.executable, "-m", "megatron_ep_v2", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANG, check=False)


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def last_json(done: subprocess.CompletedProcess) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


# An `install()` that does nothing, for what is about the command and not about Megatron, which takes seconds to import.
NO_INSTALL = """
import megatron_ep_v2
def install():
    megatron_ep_v2.status = lambda: "installed before the script"
megatron_ep_v2.install = install
"""


@pytest.fixture
def without_megatron(tmp_path: Path) -> dict[str, str]:
    """Variables for `run`."""
    write(tmp_path / "site", "sitecustomize.py", NO_INSTALL)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}


# ------------------------------------------------------------------------------------------------- what a script sees

BOUND = """
from megatron.core.transformer.moe import token_dispatcher
seen["bound"] = token_dispatcher.fused_dispatch.__module__
"""


@pytest.mark.slow
def test_a_script_runs_as_if_python_had_started_it(tmp_path: Path) -> None:
    """Its own argv, name and folder; everything bound before; its exit status is the command's."""
    write(tmp_path / "job", "pretrain.py", WITNESS + BOUND + "print(json.dumps(seen), flush=True)\nsys.exit(7)")
    write(tmp_path / "job", "neighbour.py", "")
    script = os.path.join("job", "pretrain.py")
    arguments = ["--lr", "1e-3", "--help", "-m", "run"]
    done = run("run", script, *arguments, cwd=tmp_path, MCORE_DEEPEP_V2_LAYOUT="compact")
    assert done.returncode == 7, done.stderr
    seen = last_json(done)
    assert (seen["name"], seen["file"], seen["argv"]) == ("__main__", script, [script, *arguments])
    assert seen["path"] == str(tmp_path / "job")
    assert seen["is main"]
    assert seen["bound"] == "megatron_ep_v2.fused_a2a"
    assert seen["status"]["installed"] and seen["status"]["buffer"] == "reference"
    assert seen["status"]["settings"]["layout"] == "compact (MCORE_DEEPEP_V2_LAYOUT)"
    assert "bound to the reference buffer (no CUDA device here" in done.stderr, "and the log says why"


def test_a_module_runs_as_if_python_had_started_it(tmp_path: Path, without_megatron: dict[str, str]) -> None:
    write(tmp_path, "neighbour.py", "")
    write(tmp_path / "recipes", "__init__.py", "")
    write(tmp_path / "recipes", "pretrain.py", WITNESS + "print(json.dumps(seen))")
    done = run("run", "-m", "recipes.pretrain", "--lr", "1e-3", cwd=tmp_path, **without_megatron)
    assert done.returncode == 0, done.stderr
    seen = last_json(done)
    assert (seen["name"], seen["argv"][1:]) == ("__main__", ["--lr", "1e-3"])
    assert seen["argv"][0] == seen["file"] == str(tmp_path / "recipes" / "pretrain.py")
    assert seen["path"] == str(tmp_path), "the current folder, as with python -m"
    assert seen["is main"]
    assert seen["status"] == "installed before the script"


TRAIN_ONE_STEP = r"""
import json, sys
import torch, torch.distributed as dist
import megatron_ep_v2
from megatron.core.transformer.moe.token_dispatcher import fused_combine, fused_dispatch

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
x = torch.full((3, 8), float(rank + 1), requires_grad=True)
topk_idx, probs = torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
rows, _, row_probs, counts, handle = fused_dispatch(x, topk_idx, probs, ranks, dist.group.WORLD)
y, _ = fused_combine(rows * 10, dist.group.WORLD, handle)
y.sum().backward()
seen = {"rank": rank, "argv": sys.argv[1:], "sum": y.sum().item(), "grad": x.grad.sum().item()}
seen["buffers"] = [buffer["class"] for buffer in megatron_ep_v2.status()["buffers"]]
dist.destroy_process_group()
seen["buffers left"] = len(megatron_ep_v2.status()["buffers"])
sys.stdout.write(json.dumps(seen) + "\n")  # in one piece: the other process writes too
"""


def test_under_torchrun(tmp_path: Path) -> None:
    """Two processes dispatch to each other through what `install()` bound; only the first one logs."""
    write(tmp_path, "train.py", TRAIN_ONE_STEP)
    small = {"MCORE_DEEPEP_V2_REFERENCE_STRICT": "off"}  # a small layer in fp32
    done = python("-m", "megatron_ep_v2", "run", "train.py", "--lr", "1e-3", ranks=2, cwd=tmp_path, **small)
    assert done.returncode == 0, done.stderr
    seen = sorted(map(json.loads, done.stdout.splitlines()), key=lambda of_rank: of_rank["rank"])
    same = {"argv": ["--lr", "1e-3"], "grad": 480.0, "buffers": ["ReferenceBuffer"], "buffers left": 0}
    assert seen == [{"rank": rank, "sum": (rank + 1) * 480.0, **same} for rank in range(2)]
    assert done.stderr.count("bound to the reference buffer") == 1


@pytest.mark.slow
def test_ranks_of_tests_have_torchruns_variables(tmp_path: Path) -> None:
    """Those of commands.py, where tests start ranks without torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    show = ["--nproc-per-node", "2", "--no-python", "sh", "-c", f"env > '{tmp_path}'/$RANK"]  # not into one pipe
    subprocess.run([*torchrun, *show], capture_output=True, timeout=HANG, check=True)
    lines = [file.read_text().splitlines() for file in sorted(tmp_path.iterdir())]
    theirs = [dict(line.split("=", 1) for line in each if "=" in line) for each in lines]
    for rank, variables in enumerate(theirs):
        ours = launched(rank, 2, int(variables["MASTER_PORT"]))
        assert ours == {name: variables[name] for name in ours}
    assert len(theirs) == 2


# ------------------------------------------------------------------------------------------ what cannot be run, and why


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run"], ["no script to run", "fix: "]),
        (["run", "-m"], ["no module to run", "fix: "]),
        (["run", "-m", "no.such.module"], ["there is no module no.such.module", "fix: "]),
        (["run", "nowhere.py", "--lr", "1"], ["there is no script nowhere.py", "fix: "]),
        (["run", "."], ["there is no script ."]),
        (["train.py"], ["unknown command 'train.py'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nothing_to_run(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    for part in [*parts, "usage: python -m megatron_ep_v2"]:
        assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=str)
def test_usage(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and "run SCRIPT ARGS..." in done.stdout


@pytest.mark.slow
def test_a_megatron_next_to_the_script_comes_first_and_must_fit(tmp_path: Path) -> None:
    """The script does not run on a Megatron that it would use and that cannot be bound to."""
    write(tmp_path / "job", "pretrain.py", "print('ran')")
    core = tmp_path / "job" / "megatron" / "core"
    write(core.parent, "__init__.py", "")
    write(core, "__init__.py", "__version__ = '0.99.0'")
    write(core / "transformer", "__init__.py", "")
    write(core / "transformer" / "moe", "__init__.py", "")
    write(core / "transformer" / "moe", "fused_a2a.py", "HAVE_DEEP_EP = False")
    write(core / "transformer" / "moe", "token_dispatcher.py", "")
    write(core / "tensor_parallel", "__init__.py", "")
    write(core / "tensor_parallel", "random.py", "")
    done = run("run", os.path.join("job", "pretrain.py"), cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    for part in ("SeamError: megatron-core 0.99.0: ", "fused_a2a.fused_dispatch", "fix: "):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_variable_is_an_error_before_the_script(tmp_path: Path) -> None:
    write(tmp_path, "pretrain.py", "print('ran')")
    done = python("-m", "megatron_ep_v2", "run", "pretrain.py", cwd=tmp_path, MCORE_DEEPEP_V2_LAYOUT="sorted")
    assert done.returncode == 1 and done.stdout == ""
    assert "SettingsError: " in done.stderr and "MCORE_DEEPEP_V2_LAYOUT" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["ValueError", "SettingsError"])
def test_an_error_of_the_script_is_the_scripts(kind: str, tmp_path: Path, without_megatron: dict[str, str]) -> None:
    """With its traceback; not taken for a mistake in this command's own arguments."""
    write(tmp_path, "pretrain.py", f"from megatron_ep_v2.errors import SettingsError\nraise {kind}('too hot')")
    done = run("run", "pretrain.py", cwd=tmp_path, **without_megatron)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "pretrain.py" in done.stderr and "too hot" in done.stderr
    assert "usage: python -m megatron_ep_v2" not in done.stderr


def test_a_search_path_without_the_current_folder_is_kept(tmp_path: Path, without_megatron: dict[str, str]) -> None:
    """With PYTHONSAFEPATH nothing stands before PYTHONPATH, so nothing there may be replaced."""
    write(tmp_path, "pretrain.py", "import json, sys\nprint(json.dumps(sys.path))")
    done = run("run", "pretrain.py", cwd=tmp_path, PYTHONSAFEPATH="1", **without_megatron)
    assert done.returncode == 0, done.stderr
    path = json.loads(done.stdout)
    assert str(tmp_path / "site") in path and str(ROOT) in path
