"""What `python -m megatron_ep_v2 doctor` says as a whole: what is usable, the table, the document, and its limits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_ep_v2.errors import SeamError
from megatron_ep_v2.megatron import symbols
from tests.helpers.doctor_machine import FUSED_A2A, HYBRID_EP, V1, V2_1, Machine
from tests.helpers.stacks import on_one_stack

pytestmark = on_one_stack  # the machine is made up, its packages too

DEEP_EP = "deep_ep/__init__.py"
REFERENCE = {"MCORE_DEEPEP_V2_BUFFER": "reference"}


def run_anew(machine: Machine, source: str | None = None, **environment: str) -> tuple[str, int, dict[str, str]]:
    """(usable, exit status, found by check) with this deep_ep (None: none) and these variables."""
    machine.modules.pop(DEEP_EP, None)
    if source is not None:
        machine.modules[DEEP_EP] = source
    machine.environment = environment
    report = machine.report()
    return report.usable, report.code, {name: check["found"] for name, check in report.checks.items()}


# ------------------------------------------------------------------------------------------------- what is usable now

GPUS = "8 GPUs of this host"
USABLE = [
    (V2_1, {}, f"ElasticBuffer on {GPUS}, expanded layout"),
    (V2_1, {"MCORE_DEEPEP_V2_LAYOUT": "compact"}, f"ElasticBuffer on {GPUS}, compact layout"),
    (V2_1, {"MCORE_DEEPEP_V2_ALLOW_MULTIPLE_REDUCTION": "off"}, f"ElasticBuffer on {GPUS}, compact layout"),
    (V2_1, {"MCORE_DEEPEP_V2_BUFFER": "legacy"}, f"legacy Buffer on {GPUS}, compact layout"),
    (V2_1, {"CUDA_VISIBLE_DEVICES": ""}, "reference buffer on gloo (CPU), expanded layout"),
    (V1, {}, f"Megatron's own path on the legacy Buffer, {GPUS}"),
    (HYBRID_EP, {}, f"Megatron's own path on the legacy Buffer, {GPUS}"),
    (None, REFERENCE, f"reference buffer on nccl ({GPUS}), expanded layout"),
    (None, {}, "nothing, before this is fixed: deep_ep"),
    (V1, {"MCORE_DEEPEP_V2_BUFFER": "elastic"}, "nothing, before this is fixed: deep_ep"),
    (V2_1, {"MCORE_DEEPEP_V2_BUFFER": "ep"}, "nothing, before this is fixed: deep_ep"),
    (V2_1, {"MCORE_DEEPEP_V2_BUFFER": "elastic", "CUDA_VISIBLE_DEVICES": ""}, "nothing, before this is fixed: CUDA"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "environment", "expected"), USABLE)
def test_what_is_usable(source: str | None, environment: dict[str, str], expected: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    if environment.get("CUDA_VISIBLE_DEVICES") == "":  # torch then sees none of the GPUs that the driver shows
        machine.torch["devices"] = []
    usable, code, _ = run_anew(machine, source, **environment)
    assert usable == expected and code == int(expected.startswith("nothing"))


def test_between_hosts(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.add_rdma()
    assert machine.report().usable == f"ElasticBuffer on {GPUS} and between hosts, expanded layout"


def test_hidden_gpus_are_told(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.torch["devices"] = []
    assert run_anew(machine, V2_1, CUDA_VISIBLE_DEVICES="")[2]["CUDA"] == "8 GPUs, hidden by CUDA_VISIBLE_DEVICES"


# --------------------------------------------------------------------------------------------- a deep_ep on a laptop


def test_on_a_laptop_megatron_goes_on_without_deep_ep_after_an_import_error_only(tmp_path: Path) -> None:
    machine = Machine(tmp_path).without_gpus()
    usable, code, found = run_anew(machine, "raise ImportError('libcuda.so.1: cannot open shared object file')")
    assert usable.startswith("reference buffer on gloo") and code == 0
    assert "(there is no NVIDIA driver)" in found["deep_ep"]
    for statement in ("assert False, 'Duplicate NCCL runtime'", "import os; os._exit(1)"):
        usable, code, found = run_anew(machine, statement)
        assert usable == "nothing, before this is fixed: deep_ep" and code == 1
        assert found["megatron-core"].startswith("0.19.2, symbols found"), "judged on its own"


def test_install_says_what_comes_through_megatrons_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron minds an ImportError only."""
    folder = tmp_path / "megatron" / "core" / "transformer" / "moe"
    folder.mkdir(parents=True)
    for parent in (folder, *folder.parents[:3]):
        (parent / "__init__.py").write_text("")
    (folder / "fused_a2a.py").write_text(FUSED_A2A)
    (tmp_path / "deep_ep.py").write_text("assert False, 'Duplicate NCCL runtime'")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("megatron", "deep_ep")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SeamError, match="fused_a2a cannot be imported: AssertionError: Duplicate NCCL runtime"):
        symbols.find_symbols()


# Five seconds for the process that imports deep_ep only.
SHORT = """
from megatron_ep_v2.doctor import facts
run = facts._run
def run_in_short(*module):
    facts.SECONDS = 300 if "-deep_ep" in module else 5
    return run(*module)
facts._run = run_in_short
"""


@pytest.mark.slow
def test_an_import_that_hangs_is_given_up(tmp_path: Path) -> None:
    machine = Machine(tmp_path, site=SHORT)
    usable, code, found = run_anew(machine, "import time; time.sleep(3600)")
    assert (usable, code) == ("nothing, before this is fixed: deep_ep", 1)
    assert "not done after 5 s" in found["deep_ep"]
    assert found["megatron-core"].startswith("0.19.2, symbols found")


def test_variables_that_deep_ep_was_built_with_count(tmp_path: Path) -> None:
    baked = "import os\nos.environ.setdefault('EP_JIT_CACHE_DIR', '/proc/self/baked')\n"
    assert run_anew(Machine(tmp_path), baked + V2_1)[2]["JIT cache"].startswith("/proc/self/baked: ")


# ------------------------------------------------------------------------------------------------ table and document


def test_the_table(tmp_path: Path) -> None:
    """Aligned; needed and fix under what is not right, and nowhere else."""
    machine = Machine(tmp_path, nvcc=None)
    machine.torch["version"] = "2.9.0"
    done = machine.run()
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == ""
    assert lines[-1] == "usable now: nothing, before this is fixed: nvcc"
    rows = [line for line in lines[:-1] if not line.startswith(" ")]
    assert {row.split()[0] for row in rows} == {"ok", "warn", "fail", "skip"}
    width = len("TransformerEngine")
    assert all(row[6 + width : 8 + width] == "  " and row[8 + width] != " " for row in rows)
    for name, following in (("torch ", 2), ("nvcc ", 2), ("Python ", 0)):
        at = next(i for i, line in enumerate(lines) if line[6:].startswith(name))
        notes = [line.strip().partition(":")[0] for line in lines[at + 1 : at + 3] if line.startswith(" ")]
        assert notes == ["needed", "fix"][:following]


def test_the_document_has_what_an_issue_needs_and_no_secret(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    shown = {"NCCL_DEBUG": "INFO", "EP_DISABLE_GIN": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVSHMEM_DEBUG": "INFO"}
    hidden = {"HF_TOKEN": "hush-1", "AWS_SECRET_ACCESS_KEY": "hush-2", "STEP_TOKEN": "hush-3", "MY_NCCL_KEY": "hush-4"}
    machine.environment = shown | hidden
    done = machine.run("--json")
    facts = json.loads(done.stdout)["facts"]
    assert shown.items() <= facts["environment"].items()
    assert set(facts["environment"]) == {*shown, "CUDA_HOME"}
    assert "hush" not in done.stdout
    assert facts["torch"]["version"] == "2.11.0+cu130" and facts["driver"]["version"] == "580.159"
    assert facts["deep_ep"]["version"] == "2.1.0" and facts["probe"]["nccl"]["loaded"] == "2.30.4"
    assert facts["megatron"]["version"] == "0.19.2" and facts["toolkit"]["version"] == "13.0"
    assert facts["settings"]["gin"] == "auto" and facts["megatron_ep_v2"]


def test_what_a_failed_import_wrote_is_in_the_document(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.modules[DEEP_EP] = "import sys\nsys.stderr.write('last words')\nsys.exit(5)"
    failure = machine.report().document["facts"]["deep_ep"]["failure"]
    assert failure == {"how": "ended the process (exit code 5)", "stderr": "last words"}


# ------------------------------------------------------------------------------------------- a trial that cannot start


@pytest.mark.parametrize(
    ("ranks", "source", "status", "said"),
    [
        ("9", V2_1, "fail", "9 ranks, 8 GPUs"),
        ("-1", V2_1, "fail", "-1 ranks, 8 GPUs"),
        ("2", None, "skip", "not before this is fixed: deep_ep"),
    ],
)
def test_a_trial_that_cannot_start(ranks: str, source: str | None, status: str, said: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.modules.pop(DEEP_EP)
    if source:
        machine.modules[DEEP_EP] = source
    done = machine.run("--json", "--ranks", ranks)
    trial = json.loads(done.stdout)["checks"][-1]
    assert (trial["name"], trial["status"], trial["found"]) == ("trial", status, said)
    assert done.returncode == 1


def test_wrong_arguments(tmp_path: Path) -> None:
    done = Machine(tmp_path).run("--rank", "two")
    assert done.returncode == 2 and "usage: python -m megatron_ep_v2 doctor" in done.stderr
