"""`python -m megatron_ep_v2 doctor` on made-up machines: each fault changes its own check, and no other."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.doctor_machine import DEEP_EP, FUSED_A2A, H200, HYBRID_EP, V1, V2_0, V2_1, Machine, Report, says
from tests.helpers.stacks import on_one_stack

pytestmark = [pytest.mark.slow, on_one_stack]  # a grid of processes; the machine is made up, its packages too

Change = Callable[[Machine], object]

MOE = "megatron/core/transformer/moe"
PIPS = ("site/nvidia/cu13/bin/nvcc", "site/nvidia/cu13/bin/cuobjdump")
NCCL, HEADER, CUDART = "nccl/lib/libnccl.so.2", "nccl/include/nccl.h", "cudart/libcudart.so.13"


@functools.cache
def statuses_in_order(gpus: bool) -> dict[str, str]:
    """Of the machine with eight H200, or of the laptop, with nothing wrong."""
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder))
        report = (machine if gpus else machine.without_gpus()).report()
    assert report.code == 0 and set(report.statuses().values()) <= {"ok", "skip"}
    return report.statuses()


def difference(report: Report, gpus: bool = True) -> dict[str, str]:
    """The checks that are not as on the machine in order."""
    before = statuses_in_order(gpus)
    assert set(before) == set(report.checks)
    return {name: status for name, status in report.statuses().items() if status != before[name]}


def assert_fault(report: Report, expected: dict[str, str], said: str, gpus: bool = True) -> None:
    """Exactly these checks differ; the first one says this, what is needed and how to fix it; the exit status fits."""
    assert difference(report, gpus) == expected
    first = report.checks[next(iter(expected))]
    assert said in first["found"]
    if first["status"] in ("warn", "fail"):
        assert first["needed"] and first["fix"]
    assert report.code == int("fail" in expected.values())
    assert report.usable.startswith("nothing, before this is fixed") == ("fail" in expected.values())


def put(**values: Any) -> Change:
    """Attributes of the machine; a dictionary is added to the one that is there."""

    def change(machine: Machine) -> None:
        for name, value in values.items():
            old = getattr(machine, name)
            setattr(machine, name, {**old, **value} if isinstance(value, dict) and isinstance(old, dict) else value)

    return change


def gpu(name: str, sm: str) -> Change:
    """All eight are of this kind."""
    device = [name, list(map(int, sm.split(".")))]
    return put(gpus=[{"name": name, "sm": sm}] * 8, torch={"devices": [device] * 8})


def deep_ep(source: str) -> Change:
    """Of a build that no metadata names."""

    def change(machine: Machine) -> None:
        machine.modules[DEEP_EP], machine.wheels = source, {}

    return change


def mounted(file_system: str) -> Change:
    """The home folder, on a file system of this kind."""

    def change(machine: Machine) -> None:
        home = machine.folder / "home"
        machine.files["mounts"] = f"/dev/a / ext4 rw 0 0\nserver:/home {home} {file_system} rw 0 0\n"

    return change


def rdma(name: str = "mlx5_0", *more: Change, **values: str) -> Change:
    def change(machine: Machine) -> None:
        machine.add_rdma(name, **values)
        for each in more:
            each(machine)

    return change


def both(*changes: Change) -> Change:
    return lambda machine: [change(machine) for change in changes]


def no_deep_ep(machine: Machine) -> None:
    del machine.modules[DEEP_EP]


def no_ibstat(machine: Machine) -> None:
    del machine.programs["bin/ibstat"]


OLD_PYTHON = "import platform\nplatform.python_version = lambda: '3.9.18'"
FULL_DISK = "import shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=2**28)"
OLD_MEGATRON = FUSED_A2A.replace("token_indices, ", "")
PATCHED = FUSED_A2A + "FusedDispatch.__module__ = FusedCombine.__module__ = 'megatron_ep_v2.fused_a2a'"
STRANGER = FUSED_A2A + "FusedDispatch.__module__ = 'others.patch'"
OWN_V2 = FUSED_A2A + "def deepepv2_dispatch(): ..."
KILLED = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"

# What a check needs that can no longer be found.
NO_TORCH = dict.fromkeys(
    ["NCCL", "one NCCL", "one CUDA runtime", "deep_ep", "megatron-core", "experts", "CUDA"], "skip"
)
OTHER_TORCH = {"deep_ep": "warn"}  # the wheel was built for torch 2.11
NOT_V2 = dict.fromkeys(["NCCL", "nvcc", "JIT cache", "NCCL GIN", "hybrid combine", "zero padding"], "skip")

FAULTS: dict[str, tuple[Change, dict[str, str], str]] = {
    "an old Python": (put(site=OLD_PYTHON), {"Python": "fail"}, "3.9.18"),
    "a variable with a wrong value": (
        put(environment={"MCORE_DEEPEP_V2_LAYOUT": "sorted"}),
        {"settings": "fail"},
        "cannot be 'sorted'",
    ),
    "no torch": (put(torch=None), {"torch": "fail", **NO_TORCH}, "No module named 'torch'"),
    "a torch that is too old": (put(torch={"version": "2.3.1"}), {"torch": "fail", **OTHER_TORCH}, "2.3.1"),
    "a torch too old for V2": (put(torch={"version": "2.9.1"}), {"torch": "warn", **OTHER_TORCH}, "2.9.1"),
    "grouped experts on GPUs without a grouped GEMM": (
        both(gpu("NVIDIA A100", "8.0"), put(environment={"MCORE_DEEPEP_V2_EXPERTS": "grouped"})),
        {"experts": "fail", "GPUs": "fail"},
        "no grouped GEMM for NVIDIA A100 (SM 8.0)",
    ),
    "deepgemm experts without a grouped GEMM": (
        both(put(torch={"version": "2.7.1"}), put(environment={"MCORE_DEEPEP_V2_EXPERTS": "deepgemm"})),
        {"experts": "fail", "torch": "warn", **OTHER_TORCH},
        "torch 2.7.1 has no grouped GEMM",
    ),
    "deepgemm experts without DeepGEMM": (
        put(environment={"MCORE_DEEPEP_V2_EXPERTS": "deepgemm"}),
        {"experts": "fail"},
        "the package deep_gemm is not installed",
    ),
    "grouped experts, one GPU of another kind": (
        put(
            gpus=[H200] * 7 + [{"name": "NVIDIA RTX 5090", "sm": "12.0"}],
            torch={"devices": [["NVIDIA H200", [9, 0]]] * 7 + [["NVIDIA RTX 5090", [12, 0]]]},
            environment={"MCORE_DEEPEP_V2_EXPERTS": "grouped"},
        ),
        {"experts": "fail", "zero padding": "warn"},
        "no grouped GEMM for NVIDIA RTX 5090 (SM 12.0)",
    ),
    # ------------------------------------------------------------------------------------------------------- NCCL, CUDA
    "an old NCCL": (put(files={NCCL: "22809"}), {"NCCL": "fail"}, "2.28.9 loaded"),
    "NCCL with other headers": (
        put(files={HEADER: "#define NCCL_MAJOR 2\n#define NCCL_MINOR 30\n#define NCCL_PATCH 7"}),
        {"NCCL": "fail"},
        "2.30.4 loaded, headers 2.30.7",
    ),
    "two NCCL": (
        put(files={"other/libnccl.so.2": "23004"}, torch={"libraries": [NCCL, "other/libnccl.so.2", CUDART]}),
        {"one NCCL": "fail"},
        "nccl/lib/libnccl.so.2, ",
    ),
    "an NCCL that was removed since it was loaded": (
        deep_ep(f"import sitecustomize\n(sitecustomize.machine / '{NCCL}').unlink()\n{V2_1}"),
        {"NCCL": "skip", "one NCCL": "skip"},
        "no libnccl in the process",
    ),
    "two CUDA runtimes": (
        put(files={"cu12/libcudart.so.12": "12"}, torch={"libraries": [NCCL, CUDART, "cu12/libcudart.so.12"]}),
        {"one CUDA runtime": "fail"},
        "cu12/libcudart.so.12",
    ),
    "torch without CUDA": (
        put(torch={"cuda": None, "devices": []}),
        {"CUDA": "fail"},
        "8 GPUs, torch without CUDA",
    ),
    "an old driver": (
        put(torch={"devices": [], "warning": "CUDA initialization: The NVIDIA driver on your system is too old"}),
        {"CUDA": "fail"},
        "driver 580.159 (CUDA 13.0), torch for CUDA 13.0: CUDA initialization: The NVIDIA driver",
    ),
    "old GPUs": (gpu("NVIDIA A100", "8.0"), {"GPUs": "fail"}, "8 x NVIDIA A100, SM 8.0"),
    "no NVLink": (put(link="NODE"), {"NVLink": "fail"}, "28 of 28 pairs without: GPU0-GPU1 NODE"),
    # ---------------------------------------------------------------------------------------------------------- deep_ep
    "no deep_ep": (no_deep_ep, {"deep_ep": "fail"}, "not installed"),
    "deep_ep 1": (deep_ep(V1), {"deep_ep": "warn", **NOT_V2}, "deep_ep 1.2.1: DeepEP legacy, by its API (Buffer"),
    "deep_ep 2.0": (deep_ep(V2_0), {"deep_ep": "fail"}, "deep_ep 2.0.0: DeepEP 2.0, by its API (Ela"),
    "hybrid-ep": (deep_ep(HYBRID_EP), {"deep_ep": "warn", **NOT_V2}, "1.2.1+hybrid: DeepEP hybrid-ep, by its API (Hyb"),
    "deep_ep built with a newer NCCL": (
        deep_ep("raise ImportError('_C.so: undefined symbol: ncclGetLsaDevicePointer')"),
        {"deep_ep": "fail"},
        "(the NCCL in the process is older than the one that it was built with)",
    ),
    "deep_ep's NCCL check": (
        deep_ep("assert False, 'Duplicate NCCL runtime found in the current system: a and b'"),
        {"deep_ep": "fail"},
        "AssertionError: Duplicate NCCL runtime found in the current system: a and b (two libnccl",
    ),
    "deep_ep's JIT set-up": (
        deep_ep("open('/nowhere/nvcc')"),
        {"deep_ep": "fail"},
        "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/nvcc' (a file of",
    ),
    "deep_ep that fails unforeseen": (
        deep_ep("raise KeyError('x')"),
        {"deep_ep": "fail"},
        "import: KeyError: 'x' (of unknown cause)",
    ),
    "deep_ep that kills": (deep_ep(KILLED), {"deep_ep": "fail"}, "killed the process (SIGSEGV) (whatever"),
    "deep_ep that exits": (
        deep_ep("import os\nos._exit(3)"),
        {"deep_ep": "fail"},
        "ended the process (exit code 3) (whatever",
    ),
    # ------------------------------------------------------------------------------------------------------------- JIT
    "no nvcc": (put(nvcc=None), {"nvcc": "fail"}, "None at "),
    "an old nvcc": (put(nvcc="12.2"), {"nvcc": "fail"}, "12.2 at "),
    "nvcc newer than the driver": (put(nvcc="14.0"), {"nvcc": "fail"}, "14.0 at "),
    "no cuobjdump": (put(cuobjdump=None), {"nvcc": "fail"}, "no cuobjdump next to it"),
    "a cuobjdump that prints another text": (put(cuobjdump="13.5"), {"nvcc": "fail"}, "/bin/nvcc, cuobjdump 13.5"),
    "a JIT folder that cannot be written": (
        put(environment={"EP_JIT_CACHE_DIR": "/proc/self/deep_ep"}),
        {"JIT cache": "fail"},
        "/proc/self/deep_ep: ",
    ),
    "a JIT folder without room": (put(site=FULL_DISK), {"JIT cache": "warn"}, "~/.deep_ep: 0.2 GiB free"),
    "a JIT folder on NFS": (mounted("nfs4"), {"JIT cache": "warn"}, " GiB free, on nfs4"),
    "a JIT folder on a fuse file system": (mounted("fuse.s3fs"), {"JIT cache": "warn"}, " GiB free, on fuse.s3fs"),
    # ------------------------------------------------------------------------------------------------------------- RDMA
    "RDMA": (rdma(), {"RDMA": "ok"}, "1 of 1 devices active (mlx5_0)"),
    "RDMA with a file that cannot be read": (
        rdma("mlx5_0", lambda machine: machine.files.pop("infiniband/mlx5_0/ports/1/rate")),
        {"RDMA": "ok"},
        "1 of 1 devices active",
    ),
    "RDMA that is down": (rdma(state="1: DOWN"), {"RDMA": "fail"}, "0 of 1 devices active"),
    "RDMA that is down and not used": (
        rdma("mlx5_0", put(environment={"EP_DISABLE_GIN": "1"}), state="1: DOWN"),
        {"RDMA": "warn"},
        "0 of 1 devices active",
    ),
    "no ibstat": (rdma("mlx5_0", no_ibstat), {"RDMA": "warn"}, "no ibstat on PATH"),
    "another name of the RDMA device": (rdma("mlx5_bond_0"), {"RDMA": "warn"}, "no device mlx5_0"),
    "GIN without RDMA": (put(environment={"MCORE_DEEPEP_V2_GIN": "on"}), {"NCCL GIN": "fail"}, "no RDMA device"),
    "an old OFED": (
        rdma("mlx5_0", put(files={"lib/libmlx5.so.1": "0 MLX5_1.9\0MLX5_1.17\0"})),
        {"NCCL GIN": "warn", "RDMA": "ok"},
        "libmlx5 has symbols up to MLX5_1.17",
    ),
    "EFA without its plugin": (
        rdma("rdmap0", put(environment={"EP_NIC_NAME": "rdmap0"}), vendor="0x1d0f"),
        {"EFA": "warn", "RDMA": "ok"},
        "1 devices, aws-ofi-nccl not found, num_qps chosen by deep_ep",
    ),
    "EFA": (
        rdma(
            "rdmap0",
            put(environment={"EP_NIC_NAME": "rdmap0", "MCORE_DEEPEP_V2_NUM_QPS": "2"}),
            put(files={"lib/libnccl-net-ofi.so": "0"}),
            vendor="0x1d0f",
        ),
        {"EFA": "ok", "RDMA": "ok"},
        "1 devices, aws-ofi-nccl found, num_qps 2",
    ),
    "EFA without GDRCopy": (
        rdma(
            "rdmap0",
            put(environment={"EP_NIC_NAME": "rdmap0"}),
            put(files={"lib/libnccl-net-ofi.so": "0", "modules/gdrdrv/version": "2.4\n"}),
            vendor="0x1d0f",
        ),
        {"EFA": "warn", "RDMA": "ok"},
        "1 devices, aws-ofi-nccl found, num_qps chosen by deep_ep, gdrdrv 2.4",
    ),
    # -------------------------------------------------------------------------------------------------- known to be bad
    "the hybrid combine of 2.0": (
        rdma("mlx5_0", deep_ep(V2_0)),
        {"hybrid combine": "fail", "deep_ep": "fail", "RDMA": "ok"},
        "DeepEP 2.0 in hybrid mode",
    ),
    "zero padding on SM100": (gpu("NVIDIA B200", "10.0"), {"zero padding": "warn"}, "CUDA 13.0 on SM 10.0"),
    # --------------------------------------------------------------------------------------------------------- Megatron
    "no Megatron": (
        lambda machine: [machine.modules.pop(name) for name in list(machine.modules) if name.startswith("megatron")],
        {"megatron-core": "fail"},
        "megatron.core cannot be imported: ModuleNotFoundError",
    ),
    "a Megatron with other parameters": (
        put(modules={f"{MOE}/fused_a2a.py": OLD_MEGATRON}),
        {"megatron-core": "fail"},
        "fused_a2a.FusedDispatch.forward is not what this package binds to",
    ),
    "a Megatron that kills": (
        put(modules={f"{MOE}/token_dispatcher.py": KILLED}),
        {"megatron-core": "fail"},
        "killed the process (SIGSEGV)",
    ),
    "a Megatron that another package patched": (
        put(modules={f"{MOE}/fused_a2a.py": STRANGER}),
        {"megatron-core": "warn"},
        "already patched by others.patch",
    ),
    "a broken TransformerEngine": (
        put(modules={"transformer_engine/__init__.py": "raise RuntimeError('libcudnn.so.9 is missing')"}),
        {"TransformerEngine": "fail"},
        "RuntimeError: libcudnn.so.9 is missing",
    ),
    "TransformerEngine": (
        put(modules={"transformer_engine/__init__.py": "__version__ = '2.20.2'"}),
        {"TransformerEngine": "ok"},
        "2.20.2",
    ),
    "a TransformerEngine with a cuDNN of the system": (
        put(
            modules={
                "transformer_engine/__init__.py": "import sitecustomize\n"
                "for name in ('site-packages/nvidia/cudnn/lib/libcudnn.so.9', 'usr/lib/libcudnn.so.9.14.0'):\n"
                "    sitecustomize.map_file(sitecustomize.machine / name)\n"
                "__version__ = '2.20.2'"
            },
            files={"site-packages/nvidia/cudnn/lib/libcudnn.so.9": "9", "usr/lib/libcudnn.so.9.14.0": "9"},
        ),
        {"TransformerEngine": "warn"},
        "2.20.2; two cuDNN: cudnn/lib/libcudnn.so.9, usr/lib/libcudnn.so.9.14.0",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_its_own_check(fault: str, tmp_path: Path) -> None:
    change, expected, said = FAULTS[fault]
    machine = Machine(tmp_path)
    change(machine)
    assert_fault(machine.report(), expected, said)


HARMLESS: dict[str, tuple[Change, str, str]] = {
    "NCCL from 2.31 with other headers": (put(files={NCCL: "23100"}), "NCCL", "2.31.0 loaded, headers 2.30.4"),
    "EP_DISABLE_GIN": (
        put(environment={"EP_DISABLE_GIN": "1"}),
        "NCCL GIN",
        "off: EP_DISABLE_GIN was set when the job started",
    ),
    "a Megatron patched by us": (put(modules={f"{MOE}/fused_a2a.py": PATCHED}), "megatron-core", "by megatron_ep_v2"),
    "a Megatron with deepepv2": (put(modules={f"{MOE}/fused_a2a.py": OWN_V2}), "megatron-core", "backend deepepv2"),
    "a JIT folder on a local disk": (mounted("xfs"), "JIT cache", "~/.deep_ep: "),
    "the toolkit of pip alone": (
        put(environment={"CUDA_HOME": ""}, programs=dict.fromkeys(PIPS, says("13.0")), nvcc=None),
        "nvcc",
        "cu13/bin/nvcc, which this package names in CUDA_HOME: call install(), or import megatron_ep_v2.auto, before",
    ),
    "CUDA 13.1 on SM100": (both(gpu("NVIDIA B200", "10.0"), put(nvcc="13.1")), "zero padding", "compiles"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_no_fault(case: str, tmp_path: Path) -> None:
    change, name, said = HARMLESS[case]
    machine = Machine(tmp_path)
    change(machine)
    report = machine.report()
    assert difference(report) == {} and said in report.checks[name]["found"]
