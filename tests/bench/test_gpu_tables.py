"""`benchmarks/gpu_tables.py`: what is done is not run again, and nothing that fails or hangs stops the others."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_tables
import pytest
from gpu_tables import PARTS, Here, Part

from megatron_ep_v2.cli.bench_options import parse
from tests.bench.test_bench import ROOT
from tests.helpers.harness import HANG
from tests.helpers.paths import PYTHONPATH

HEADER = {"environment": True, "gpu": "8 x Some GPU", "torch": "2.99", "deep_ep": "deep_ep 2.1.0", "commit": "abc1234"}
HERE = Here(
    name="deepep-2.1", header=HEADER, ranks=8, gpus=8, carriers=["v2"], ours="", packages=["pytest", "matplotlib"]
)
SAY = Part("say", "", "sh -c 'echo said; echo line >>{out}.runs'")
FAIL = Part("fail", "", "sh -c 'for i in 1 2 3 4 5 6 7 8; do echo line $i; done; exit 3'")
ROWS = Part("rows", "", """sh -c 'echo "[]" >{rows}; echo "{{}}"'""")
STARTS = (
    "import subprocess, time; subprocess.Popen(['sleep', '1000'], start_new_session=True); print('started', flush=True)"
)
HANGS = Part("hangs", "", f'{{python}} -c "{STARTS}; time.sleep(1000)"', limit=1.5)


def call(folder: Path, *parts: Part, here: Here = HERE, options: str = "") -> int:
    return gpu_tables.main(parts, lambda parts, cpu: here, [str(folder), *options.split()])


def state(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "state.json").read_text())


def runs(folder: Path) -> int:
    """How often `SAY` has run."""
    return len((folder / "deepep-2.1" / "say.runs").read_text().splitlines())


def outcomes(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """By part, what the summary says about it."""
    summary = f"\n{capsys.readouterr().out}".rpartition("\n\n")[2]
    lines = [line.split() for line in summary.splitlines() if not line.startswith("    |")]
    return {name: " ".join([status, *words]) for status, name, *words in lines}


def test_what_fails_stops_no_other_and_runs_again_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, FAIL, SAY, ROWS) == 1
    text = capsys.readouterr().out
    log = tmp_path / "deepep-2.1" / "fail.log"
    assert f"exit status 3; {log}\n    | line 3\n    | line 4" in text and "| line 8" in text and "line 2" not in text
    assert log.read_text().startswith("$ sh -c ") and "failed       fail" in text and "done         say" in text
    header, row = map(json.loads, (tmp_path / "deepep-2.1" / "say.jsonl").read_text().splitlines())
    assert (
        header.items()
        >= {"environment": True, "commit": "abc1234", "command": state(tmp_path)["deepep-2.1/say"]["command"]}.items()
    )
    assert row.items() >= {"part": "say", "status": "done", "says": "said"}.items()
    assert (tmp_path / "deepep-2.1" / "rows.jsonl").read_text() == "[]\n"  # as the command wrote it

    assert call(tmp_path, FAIL, SAY, Part("new", "", "true")) == 1
    text = capsys.readouterr().out
    assert text.index("new: at most") < text.index("fail: at most") and "say: at most" not in text
    assert call(tmp_path, dataclasses.replace(FAIL, command="true"), SAY) == 0


def test_what_is_done_runs_again_only_if_something_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def again(here: Here = HERE, part: Part = SAY, options: str = "") -> int:
        call(tmp_path, part, here=here, options=options)
        return runs(tmp_path)

    assert [again(), again(), again(options="--again say"), again()] == [1, 1, 2, 2]
    assert "done at abc1234" in outcomes(capsys)["say"]
    for count, differs in enumerate(({"commit": "def5678"}, {"gpu": "4 x Some GPU"}, {"torch": "3.0"}), start=3):
        here = dataclasses.replace(HERE, header=HEADER | differs)
        assert [again(here), again(here)] == [count, count], differs
    more = dataclasses.replace(SAY, variables={"ONE": "1"})
    assert [again(part=more), again(part=more)] == [6, 6]
    assert state(tmp_path)["deepep-2.1/say"]["command"].startswith("ONE=1 sh -c")
    call(tmp_path, SAY, here=dataclasses.replace(HERE, name="deepep-2.5"))
    assert set(state(tmp_path)) == {"deepep-2.1/say", "deepep-2.5/say"}


def test_a_changed_tree_is_not_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tables, "ROOT", tmp_path)
    source = tmp_path / "benchmarks" / "script.py"
    source.parent.mkdir()
    source.write_text("1")
    without = gpu_tables.sources("megatron_ep_v2 0.1.0")
    (tmp_path / ".git").mkdir()
    assert gpu_tables.sources("abc1234") == "abc1234" and without.startswith("megatron_ep_v2 0.1.0+")
    before = gpu_tables.sources("abc1234-dirty")
    source.write_text("2")
    assert before != gpu_tables.sources("abc1234-dirty") and before.startswith("abc1234-dirty+")


def test_a_hang_is_ended_with_all_of_its_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, HANGS, SAY) == 1
    assert "hangs: it takes longer than 2 s" in outcomes(capsys)["hangs"] and runs(tmp_path) == 1
    assert gpu_tables.marked(f"{gpu_tables.MARK}={tmp_path}") == set()
    log = (tmp_path / "deepep-2.1" / "hangs.log").read_text()
    assert "started" in log and "Fatal Python error: Aborted" in log and 'File "<string>", line 1' in log


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_part_runs_again(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ready = tmp_path / "ready"
    waits = Part("waits", "", f"sh -c 'test -e {ready} || {{{{ echo $$ >{ready}; sleep 1000; }}}}'")
    parts, folder = (SAY, waits), tmp_path / "results"
    script = tmp_path / "script.py"
    script.write_text(
        f"import gpu_tables\nfrom gpu_tables import Here, Part\ngpu_tables.prepare()\n"
        f"gpu_tables.main({parts!r}, lambda parts, cpu: {HERE!r}, [{str(folder)!r}])\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": PYTHONPATH})
    deadline = time.monotonic() + HANG
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(SystemExit, match="another call works in"):
        call(folder, *parts)
    process.send_signal(number)
    process.wait(HANG)
    mark = f"{gpu_tables.MARK}={folder}"
    assert bool(gpu_tables.marked(mark)) == (number == signal.SIGKILL)
    assert state(folder)["deepep-2.1/waits"]["status"] == "interrupted"
    capsys.readouterr()

    ended = Part("ended", "", f"sh -c 'test -z \"$(head -c 1 /proc/$(cat {ready})/environ)\"'")
    assert call(folder, ended, *parts) == 0 and gpu_tables.marked(mark) == set()
    assert runs(folder) == 1 and outcomes(capsys)["waits"].startswith("done")


def test_no_part_starts_that_usually_takes_longer_than_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = Part("long", "", "true", limit=500)
    call(tmp_path, long, SAY, options="--budget 8")
    said = outcomes(capsys)
    assert said["long"].startswith("skipped takes 500 s, and 4") and said["say"].startswith("done")
    call(tmp_path, long)
    call(tmp_path, long, SAY, options="--budget 8 --again long")  # whose usual time is known now
    assert outcomes(capsys)["long"].startswith("done")


@pytest.mark.parametrize(
    ("says", "status"), [("17 skipped", "failed no test has run"), ("2 passed, 15 skipped", "done 2 passed")]
)
def test_tests_of_which_none_has_run_are_a_failure(
    says: str, status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = Part("part", "", f"echo '== {says} in 1 s =='", f"echo {says}", packages=("pytest",))
    assert call(tmp_path, part) == status.startswith("failed")
    text = outcomes(capsys)["part"]
    assert " ".join(word for word in text.split() if word not in ("0", "s")).startswith(status)
    assert call(tmp_path, part, here=CPU) == 0


FITTING = Part("part", "", "true", "true")
CPU = dataclasses.replace(HERE, name="cpu", gpus=0, ranks=2, header={"cpu": "2 x Some CPU", "commit": "abc1234"})
SKIPPED: list[tuple[dict[str, Any], Here, str, str]] = [
    ({}, HERE, "", ""),
    ({"cpu": ""}, CPU, "", "has no CPU form"),
    ({"carrier": "hybridep"}, HERE, "", "needs HybridEP; here: deep_ep 2.1.0"),
    ({"carrier": ""}, dataclasses.replace(HERE, carriers=[]), "", ""),
    ({"packages": ("pytest", "apex")}, HERE, "", "needs apex"),
    ({"packages": ("apex",)}, CPU, "", ""),
    ({"ranks": 8}, HERE, "--ranks 4", "needs 8 ranks; here: 4"),
    ({"times": True}, dataclasses.replace(HERE, gpus=1, ranks=2), "", "ranks share a GPU"),
    ({"times": True}, dataclasses.replace(HERE, gpus=1, ranks=2), "--share", ""),
    ({"times": True}, CPU, "", ""),
    ({"megatron_lm": True}, HERE, "", "needs --megatron-lm FOLDER"),
    ({"megatron_lm": True}, HERE, f"--megatron-lm {ROOT}", ""),
    ({"megatron_lm": True}, HERE, f"--megatron-lm {ROOT}/docs", "needs --megatron-lm FOLDER"),
    ({"command": "{python} script.py {runs}"}, HERE, "", "needs a run of train-expanded or another"),
]


@pytest.mark.parametrize(("more", "here", "options", "why"), SKIPPED)
def test_what_does_not_fit_is_skipped_and_says_why(
    more: dict[str, Any], here: Here, options: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = dataclasses.replace(FITTING, **more)
    assert call(tmp_path, part, here=here, options=f"{options} --list") == 0
    fate = capsys.readouterr().out.splitlines()[-1].strip()
    assert fate.startswith(why or "runs, at most 300 s") and not (tmp_path / "state.json").exists()
    assert call(tmp_path, part, here=here, options=options) == 0
    assert outcomes(capsys)["part"].startswith(f"skipped {why}" if why else "done")


def test_the_plot_shows_the_runs_of_all_environments(tmp_path: Path) -> None:
    plot = Part("train-plot", "", "echo {runs} '{machine}'", "echo {runs}", carrier="")
    trained = Part("train-some", "", "true", "true")
    for name in ("deepep-2.1", "deepep-2.5"):
        call(tmp_path, trained, plot, here=dataclasses.replace(HERE, name=name))
    call(tmp_path, trained, plot, here=CPU)
    first, second, cpu = [
        (tmp_path / name / "train-plot.log").read_text() for name in ("deepep-2.1", "deepep-2.5", "cpu")
    ]
    assert first.endswith(
        f"\ndeepep-2.1/some={tmp_path}/deepep-2.1/train-some 8 x Some GPU, torch 2.99, deep_ep deep_ep 2.1.0, abc1234\n"
    )
    assert (
        f"\ndeepep-2.1/some={tmp_path}/deepep-2.1/train-some deepep-2.5/some={tmp_path}/deepep-2.5/train-some 8 x"
        in second
    )
    assert cpu.endswith(f"\ncpu/some={tmp_path}/cpu/train-some\n")


def test_the_table_names_files_and_options_that_there_are(tmp_path: Path) -> None:
    """Of each part in either form. Whether it runs, `--cpu` shows."""
    for here in (HERE, CPU):
        options = argparse.Namespace(results=tmp_path, ranks=None, budget=1)
        for part in PARTS:
            words = gpu_tables.Call(PARTS, here, options).command(part)
            files = [word for word in words if word.startswith(("tests/gpu/", "benchmarks/"))]
            assert all((ROOT / file).is_file() for file in files), part.name
            if words[1:4] == ["-m", "megatron_ep_v2", "bench"]:
                assert parse(words[4:]).ranks == here.ranks, part.name
