"""`python -m megatron_ep_v2 train`: what it starts, and what it says where it cannot.

`make wheel-check` trains with it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from megatron_ep_v2.cli.train import train
from megatron_ep_v2.errors import UnavailableError

LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]


class Replaced(Exception):
    """The process would be torchrun now."""


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that this process becomes."""
    command: list[str] = []

    def execv(program: str, arguments: list[str]) -> None:
        assert program == sys.executable
        command.extend(arguments)
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    for name in ("RANK", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return command


def test_it_becomes_torchrun_on_this_module(started: list[str]) -> None:
    """As a module, so that ranks find the package where this process has found it: in a source tree, too."""
    rest = ["--steps", "5", "--out", "here"]
    with pytest.raises(Replaced):
        train(["--nproc", "3", *rest])
    assert started[:3] == LAUNCHER
    assert started[-9:] == ["--nproc-per-node", "3", "-m", "megatron_ep_v2", "train", *rest]
    assert int(os.environ["OMP_NUM_THREADS"]) >= 1


def test_where_no_affinity_is_known(started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no `sched_getaffinity`."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    with pytest.raises(Replaced):
        train(["--nproc", "4"])
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_that_is_none(number: str, started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(["--nproc", number])
    assert stopped.value.code == 2 and not started
    assert f"argument --nproc: invalid number of processes: '{number}'" in capsys.readouterr().err


def test_what_the_example_needs_is_looked_for_first(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra "example" brings both; the plots come after the last step."""
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "tqdm.py").touch()
    for arguments in ([], ["--help"]):
        with pytest.raises(UnavailableError, match=r"are not here: matplotlib\n  fix: pip install matplotlib$"):
            train(arguments)
    assert not started


def test_help_is_that_of_the_example_and_names_the_own_argument(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-ep-v2"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit):
        train(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: megatron-ep-v2 train [--nproc N] [options]\n") and "--save-interval" in said
