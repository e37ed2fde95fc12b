"""What `doctor` says about every generation of DeepEP, alone and in mixtures: which package is taken, what is judged by
its needs, and fixes that lead out and not back to what is there. The made-up machine has torch 2.14.1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ep_v2 import generations, versions
from megatron_ep_v2.doctor import deep_ep
from tests.helpers.doctor_machine import (
    DEEP_EP,
    DEEP_EP_V25,
    HYBRID_EP,
    V1,
    V2_0,
    V2_1,
    V2_5,
    WHEEL_2_1,
    WHEEL_2_5,
    Machine,
    Report,
)
from tests.helpers.stacks import on_one_stack

pytestmark = [pytest.mark.slow, on_one_stack]  # a grid of processes; the machine is made up, its packages too

NCCL_OF_2_1, NCCL_OF_2_5 = (2, 30, 7), (2, 32, 3)
NO_NCCL_FOR_2_5 = "raise ImportError('DeepEP 2.5 needs NCCL 2.32.3 or newer, but /nccl has 2.30.7')"
NO_NVCC_FOR_2_5 = "raise ImportError('DeepEP 2.5 needs nvcc 13.1 or newer within CUDA 13, but /nvcc is 13.0')"
NO_NCCL_FOR_2_1 = "raise ImportError('_C.so: undefined symbol: ncclGetLsaDevicePointer')"
ASSERTS = "assert False, 'Invalid NCCL versions: a (loaded) v.s. b (expected)'"
OTHER_TORCH = "raise ImportError('_C.so: undefined symbol: _ZN3c106detail')"
UNKNOWN = "raise ImportError('a text that no release has printed')"

PUT_2_1 = "pip install sgl-deep-ep==0.1.2.post1"
PUT_2_5 = "pip install sgl-deep-ep-v25==0.1.0rc0 && pip install --no-deps 'nvidia-nccl-cu13>=2.32.3'"
NCCL_2_1, NCCL_2_5 = "pip install --no-deps 'nvidia-nccl-cu13==2.30.7'", PUT_2_5.partition(" && ")[2]
WITHOUT_2_1, WITHOUT_2_5 = "pip uninstall -y sgl-deep-ep && ", "pip uninstall -y sgl-deep-ep-v25 && "
EXCLUDE = "the NCCL versions of their wheels exclude each other"
V2_5_FIRST = f"{WITHOUT_2_1}{NCCL_2_5}; or, to take the other one: {WITHOUT_2_5}{NCCL_2_1}"
V2_1_FIRST = f"{WITHOUT_2_5}{NCCL_2_1}; or, to take the other one: {WITHOUT_2_1}{NCCL_2_5}"


@dataclass(frozen=True)
class State:
    """What is installed, and what the check "deep_ep" must say.

    Attributes:
        packages: (file, source, wheel or None) of each package.
        nccl: The NCCL that is there.
        usable: The carrier in the line "usable now"; None = nothing.
        status: Of the check.
        found: What it says first.
        fix: All of its fix; None = it has none.
        needed: A part of what it needs.
    """

    packages: tuple[tuple[str, str, str | None], ...]
    nccl: tuple[int, int, int]
    usable: str | None
    status: str
    found: str
    fix: str | None = None
    needed: str = ""


EP, ELASTIC = "EPBuffer on 8 GPUs", "ElasticBuffer on 8 GPUs"
OWN_PATH = "Megatron's own path on the legacy Buffer"
OF_2_1, OF_2_5 = (DEEP_EP, V2_1, WHEEL_2_1), (DEEP_EP_V25, V2_5, WHEEL_2_5)
TAKEN = ", taken: the newest generation is preferred; "

STATES: dict[str, State] = {
    "2.5 as deep_ep": State(
        ((DEEP_EP, V2_5, "deepinfer-ep==2.5.0"),),
        NCCL_OF_2_5,
        EP,
        "ok",
        "deep_ep 2.5.0 (deepinfer-ep==2.5.0): DeepEP 2.5, by its API (EPBuffer)",
    ),
    "2.5 as deep_ep_v25": State(
        (OF_2_5,),
        NCCL_OF_2_5,
        EP,
        "ok",
        "deep_ep_v25 2.5.0 (sgl-deep-ep-v25==0.1.0rc0): DeepEP 2.5, by its API (EPBuffer)",
    ),
    "2.1": State(
        (OF_2_1,),
        NCCL_OF_2_1,
        ELASTIC,
        "ok",
        "deep_ep 2.1.0 (sgl-deep-ep==0.1.2.post1): DeepEP 2.1, by its API (ElasticBuffer, whose dispatch takes do_z",
    ),
    "2.0": State(
        ((DEEP_EP, V2_0, "deep_ep==2.0.0"),),
        NCCL_OF_2_1,
        None,
        "fail",
        "deep_ep 2.0.0 (deep-ep==2.0.0): DeepEP 2.0, by its API (ElasticBuffer, whose dispatch takes no do_z",
        f"pip uninstall -y deep-ep && {PUT_2_1}",
    ),
    "hybrid-ep": State(
        ((DEEP_EP, HYBRID_EP, None),),
        NCCL_OF_2_1,
        OWN_PATH,
        "warn",
        "deep_ep 1.2.1+hybrid: DeepEP hybrid-ep, by its API (HybridEPBuffer",
        f"pip uninstall -y deep-ep && {PUT_2_1}",
    ),
    "legacy": State(
        ((DEEP_EP, V1, "deep_ep==1.2.1"),),
        NCCL_OF_2_1,
        OWN_PATH,
        "warn",
        "deep_ep 1.2.1 (deep-ep==1.2.1): DeepEP legacy, by its API (Buffer, and no newer class)",
        f"pip uninstall -y deep-ep && {PUT_2_1}",
    ),
    "none": State((), NCCL_OF_2_1, None, "fail", "not installed", PUT_2_1, "DeepEP 2.5 with EPBuffer or DeepEP 2.1"),
    "2.1 and 2.5": State(
        (OF_2_1, OF_2_5),
        NCCL_OF_2_5,
        EP,
        "warn",
        f"deep_ep_v25 2.5.0 (sgl-deep-ep-v25==0.1.0rc0): DeepEP 2.5, by its API (EPBuffer){TAKEN}deep_ep 2.1.0 (",
        V2_5_FIRST,
        EXCLUDE,
    ),
    "2.1, and 2.5 without its NCCL": State(
        (OF_2_1, (DEEP_EP_V25, NO_NCCL_FOR_2_5, WHEEL_2_5)),
        NCCL_OF_2_1,
        ELASTIC,
        "warn",
        "deep_ep 2.1.0 (sgl-deep-ep==0.1.2.post1): DeepEP 2.1, by its API",
        V2_1_FIRST,
        EXCLUDE,
    ),
    "2.5, and 2.1 without its NCCL": State(
        ((DEEP_EP, NO_NCCL_FOR_2_1, WHEEL_2_1), OF_2_5),
        NCCL_OF_2_5,
        EP,
        "warn",
        f"deep_ep_v25 2.5.0 (sgl-deep-ep-v25==0.1.0rc0): DeepEP 2.5, by its API (EPBuffer){TAKEN}deep_ep (",
        V2_5_FIRST,
        EXCLUDE,
    ),
    "2.5, and 2.1 that Megatron's import does not survive": State(
        ((DEEP_EP, ASSERTS, WHEEL_2_1), OF_2_5),
        NCCL_OF_2_5,
        None,
        "fail",
        f"deep_ep_v25 2.5.0 (sgl-deep-ep-v25==0.1.0rc0): DeepEP 2.5, by its API (EPBuffer){TAKEN}deep_ep (",
        V2_5_FIRST,
        EXCLUDE,
    ),
    "2.1 and 2.5, neither with its NCCL": State(
        ((DEEP_EP, NO_NCCL_FOR_2_1, WHEEL_2_1), (DEEP_EP_V25, NO_NCCL_FOR_2_5, WHEEL_2_5)),
        (2, 28, 9),
        None,
        "fail",
        "deep_ep (sgl-deep-ep==0.1.2.post1): import: ImportError: _C.so: undefined symbol: ncclGetLsa",
        V2_1_FIRST,
    ),
    "2.5 without its NCCL": State(
        ((DEEP_EP_V25, NO_NCCL_FOR_2_5, WHEEL_2_5),),
        NCCL_OF_2_1,
        None,
        "fail",
        "deep_ep_v25 (sgl-deep-ep-v25==0.1.0rc0): import: ImportError: DeepEP 2.5 needs NCCL",
        f"{NCCL_2_5}; take others off LD_LIBRARY_PATH",
    ),
    "2.5 without its nvcc": State(
        ((DEEP_EP_V25, NO_NVCC_FOR_2_5, WHEEL_2_5),),
        NCCL_OF_2_5,
        None,
        "fail",
        "deep_ep_v25 (sgl-deep-ep-v25==0.1.0rc0): import: ImportError: DeepEP 2.5 needs nvcc",
        f"{generations.nvcc_command('2.5')}, where CUDA_HOME is not set; or set it to CUDA 13.1 or newer, or take the "
        f"other generation: {WITHOUT_2_5}{PUT_2_1} && {NCCL_2_1}",
    ),
    "2.1 of another torch": State(
        ((DEEP_EP, OTHER_TORCH, "tokenspeed-deepep==2.1.0.post20260801"),),
        NCCL_OF_2_1,
        None,
        "fail",
        "deep_ep (tokenspeed-deepep==2.1.0.post20260801): import: ImportError: _C.so: undefined symbol: _ZN3c10",
        f"pip uninstall -y tokenspeed-deepep && {PUT_2_1}",
    ),
    "2.1 that fails unforeseen": State(
        ((DEEP_EP, UNKNOWN, WHEEL_2_1),),
        NCCL_OF_2_1,
        None,
        "fail",
        "deep_ep (sgl-deep-ep==0.1.2.post1): import: ImportError: a text that no release has printed (of unknown",
        f"{NCCL_2_1}; if it still fails, report it with --json's output, and take the other generation: "
        f"{WITHOUT_2_1}{PUT_2_5}",
    ),
    "a broken build that no metadata names": State(
        ((DEEP_EP, OTHER_TORCH, None),),
        NCCL_OF_2_1,
        None,
        "fail",
        "deep_ep: import: ImportError: _C.so: undefined symbol",
        f"pip uninstall -y deep-ep && {PUT_2_1}",
    ),
    "legacy, and 2.5 without its NCCL": State(
        ((DEEP_EP, V1, "deep_ep==1.2.1"), (DEEP_EP_V25, NO_NCCL_FOR_2_5, WHEEL_2_5)),
        NCCL_OF_2_1,
        OWN_PATH,
        "warn",
        "deep_ep 1.2.1 (deep-ep==1.2.1): DeepEP legacy, by its API (Buffer, and no newer class), taken: Megatron's own",
        f"pip uninstall -y deep-ep sgl-deep-ep-v25 && {PUT_2_1} && {NCCL_2_1}",
    ),
    "no known buffer": State(
        ((DEEP_EP, "__version__ = '3.0'", "deep_ep==3.0"),),
        NCCL_OF_2_1,
        None,
        "fail",
        "deep_ep 3.0 (deep-ep==3.0): no known buffer",
        f"pip uninstall -y deep-ep && {PUT_2_1}",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_every_generation_and_mixture(name: str, tmp_path: Path) -> None:
    state = STATES[name]
    report = Machine(tmp_path).put_deep_ep(*state.packages, nccl=state.nccl).report()
    check = report.checks["deep_ep"]
    assert check["found"].startswith(state.found)
    assert (check["status"], check["fix"]) == (state.status, state.fix)
    assert state.needed in (check["needed"] or "")
    assert report.usable.startswith(state.usable or "nothing, before this is fixed: ")
    assert "deep_ep" in report.usable or state.usable
    assert_no_circle(report, [wheel for _, _, wheel in state.packages if wheel])


def assert_no_circle(report: Report, installed: list[str]) -> None:
    """No fix is to install what is there; that of "deep_ep" names a wheel, or the NCCL of one."""
    fixes = [check["fix"] for check in report.checks.values() if check["fix"]]
    assert [fix for fix in fixes for wheel in installed if wheel in fix.split()] == []
    assert not any("build" in fix for fix in fixes)
    wheels = [f"{distribution}==" for _, distribution, *_ in versions.WHEELS]
    named = (*wheels, *(generations.nccl_command(name) for name in generations.WITH_WHEELS))
    fix = report.checks["deep_ep"]["fix"]
    assert fix is None or any(each in fix for each in named)


def test_every_cause_has_a_fix_for_every_generation() -> None:
    """Filled in without an error, whatever is installed; no generation is sent back to its own wheel."""
    for part, _, _ in deep_ep._CAUSES:
        for package, wheel, torch in (
            ("deep_ep", WHEEL_2_1, "2.14.1"),
            ("deep_ep_v25", WHEEL_2_5, "2.14.1"),
            ("deep_ep", "tokenspeed-deepep==2.1.0.post20260801", "2.11.0"),
            ("deep_ep", "sgl-deep-ep==0.1.2", "2.14.1"),  # of another torch, and not in the table
            ("deep_ep", None, "2.15.0"),
        ):
            broken = {"name": package, "failure": {"how": f"ImportError: {part}"}}
            facts = {"deep_ep": {}, "deep_ep_v25": {}, package: broken, "torch": {"version": torch}}
            facts |= {"distributions": {package: wheel} if wheel else {}, "probe": {}}
            facts["settings"] = {"buffer": "auto", "sources": {}}
            used = deep_ep.package_in_use(facts)
            assert used is not None
            fix = deep_ep._repair(facts, used)
            assert "{" not in fix and wheel not in fix.split()


# ---------------------------------------------------------------------------------- what rests on the generation in use

Change = Callable[[Machine], object]


def machine_with_2_5(folder: Path) -> Machine:
    return Machine(folder).put_deep_ep(OF_2_5, nccl=NCCL_OF_2_5)


def without_cuobjdump(machine: Machine) -> None:
    machine.cuobjdump = None


def old_nvcc(machine: Machine) -> None:
    machine.nvcc = "13.0"


def blackwell_with_old_nvcc(machine: Machine) -> None:
    assert machine.torch
    machine.nvcc, machine.gpus = "13.0", [{"name": "NVIDIA B200", "sm": "10.0"}] * 8
    machine.torch["devices"] = [["NVIDIA B200", [10, 0]]] * 8


def old_nccl(machine: Machine) -> None:
    machine.put_deep_ep(OF_2_5, nccl=NCCL_OF_2_1)


def older_torch(machine: Machine) -> None:
    assert machine.torch
    machine.torch["version"] = "2.11.0+cu130"


def list_of_folders(machine: Machine) -> None:
    first = machine.folder / "first"
    machine.environment["EP_JIT_CACHE_DIR"] = f"{first}:/proc/self/second"


def variable_of_deep_jit(machine: Machine) -> None:
    machine.environment["DJ_JIT_CACHE_DIR"] = "/proc/self/folder"


def home_on_lustre(machine: Machine) -> None:
    machine.files["mounts"] = f"mds:/fs {machine.folder / 'home'} lustre rw 0 0\n"


def efa(gin: str) -> Change:
    def change(machine: Machine) -> None:
        machine.add_rdma("rdmap0", vendor="0x1d0f")
        machine.files["lib/libnccl-net-ofi.so"] = "0"
        machine.environment |= {"MCORE_DEEPEP_V2_NUM_SMS": "24", "MCORE_DEEPEP_V2_GIN": gin}

    return change


def mellanox_of_another_name(machine: Machine) -> None:
    machine.add_rdma("mlx5_7")
    machine.environment["EP_NIC_NAME"] = "mlx5_7"  # which 2.5 does not read


STAY = f"between hosts stay on DeepEP 2.1: {WITHOUT_2_5}{PUT_2_1} && {NCCL_2_1}"
OF_2_5_MACHINE: dict[str, tuple[Change, dict[str, str], str, str]] = {
    "no cuobjdump": (without_cuobjdump, {}, "13.1 at ", ""),
    "an old nvcc": (old_nvcc, {"nvcc": "fail"}, "13.0 at ", "set CUDA_HOME"),
    "an old nvcc on SM100": (blackwell_with_old_nvcc, {"nvcc": "fail"}, "13.0 at ", "set CUDA_HOME"),
    "an old NCCL": (old_nccl, {"NCCL": "fail"}, "2.30.7 loaded", f"{NCCL_2_5}; take others off LD_LIBRARY_PATH"),
    "an older torch": (
        older_torch,
        {"deep_ep": "fail"},
        "deep_ep_v25 2.5.0",
        f"pip install torch==2.14.1; or, with this torch, {WITHOUT_2_5}pip install tokenspeed-deepep==2.1.0.post2026",
    ),
    "a list of cache folders": (list_of_folders, {}, "first: ", ""),
    "DeepJIT's own variable": (variable_of_deep_jit, {"JIT cache": "fail"}, "/proc/self/folder: ", "EP_JIT_CACHE_DIR"),
    "a JIT folder on Lustre": (home_on_lustre, {}, "~/.dj: ", ""),
    "EFA": (efa("auto"), {"EFA": "warn", "RDMA": "ok"}, "which DeepEP 2.5 cannot use: one host only, on NVLink", STAY),
    "EFA and gin=on": (efa("on"), {"EFA": "fail", "RDMA": "ok"}, "1 devices, which DeepEP 2.5 cannot use", STAY),
    "EFA and gin=off": (efa("off"), {"EFA": "ok", "RDMA": "ok"}, "1 devices, not used", ""),
    "another name of the RDMA device": (
        mellanox_of_another_name,
        {"RDMA": "warn"},
        "no device mlx5_0",
        "install infiniband-diags, or set MCORE_DEEPEP_V2_NUM_SMS (e.g. 24)",
    ),
}
CHECK_OF = {"no cuobjdump": "nvcc", "a list of cache folders": "JIT cache", "a JIT folder on Lustre": "JIT cache"}


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_2_5_MACHINE)
def test_what_2_5_needs(case: str, tmp_path: Path) -> None:
    change, expected, said, fix = OF_2_5_MACHINE[case]
    (tmp_path / "in order").mkdir()
    before = machine_with_2_5(tmp_path / "in order").report().statuses()
    assert set(before.values()) <= {"ok", "skip"}
    machine = machine_with_2_5(tmp_path)
    change(machine)
    report = machine.report()
    assert {name: status for name, status in report.statuses().items() if status != before[name]} == expected
    check = report.checks[CHECK_OF.get(case) or next(iter(expected))]
    assert said in check["found"] and fix in (check["fix"] or "")
    assert_no_circle(report, [WHEEL_2_5])


@pytest.mark.parametrize("buffer", ["elastic", "legacy"])
def test_a_class_that_2_5_has_not(buffer: str, tmp_path: Path) -> None:
    machine = machine_with_2_5(tmp_path)
    machine.environment["MCORE_DEEPEP_V2_BUFFER"] = buffer
    report = machine.report()
    assert report.usable == "nothing, before this is fixed: deep_ep"
    assert report.checks["deep_ep"]["fix"] == f"unset MCORE_DEEPEP_V2_BUFFER; or {WITHOUT_2_5}{PUT_2_1} && {NCCL_2_1}"


# ----------------------------------------------------------------------------------------- NVSHMEM of the legacy Buffer


@pytest.mark.parametrize(
    ("version", "rdma", "source", "status"),
    [
        ("3.6.5", True, V1, "warn"),
        ("3.5.19", True, V1, "warn"),
        ("3.4.5", True, V1, "ok"),
        ("3.6.5", False, V1, "ok"),
        ("3.6.5", True, V2_1, "skip"),
    ],
)
def test_nvshmem(version: str, rdma: bool, source: str, status: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path).put_deep_ep((DEEP_EP, source, None), nccl=NCCL_OF_2_1)
    info = f"site/nvidia_nvshmem_cu13-{version}.dist-info/METADATA"
    machine.files[info] = f"Metadata-Version: 2.1\nName: nvidia-nvshmem-cu13\nVersion: {version}\n"
    if rdma:
        machine.add_rdma()
    check = machine.report().checks["NVSHMEM"]
    assert check["status"] == status
    if status == "warn":
        assert version in check["found"] and "3.5.19" in check["needed"] and PUT_2_1 in check["fix"]
