"""A made-up machine for the doctor: modules, programs, libraries and devices in one folder, to run the real command on.

Nothing of this machine shows through: torch, the packages of DeepEP, megatron and TransformerEngine are small
stand-ins, nvidia-smi, nvcc and ibstat are scripts, shared libraries are files that a stand-in maps into memory, as
loading them would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.harness import HANG
from tests.helpers.paths import ROOT

# Every process of the machine runs this first.
SITE = """
import ctypes, mmap, pathlib, sys
from importlib.machinery import PathFinder
from importlib.metadata import DistributionFinder

machine = pathlib.Path(__file__).parent.parent
kept, load = [], ctypes.CDLL

class OnlyHere:
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        foreign = spec and name in ("torch", "deep_ep", "deep_ep_v25", "megatron", "transformer_engine")
        return None if foreign and not str(spec.origin).startswith(str(machine)) else spec

    def find_distributions(context=DistributionFinder.Context()):
        return [each for each in PathFinder.find_distributions(context) if str(each._path).startswith(str(machine))]

sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyHere

def map_file(path):
    with open(path, "rb") as file:
        kept.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

class Library:
    def __init__(self, path):
        self.code = int(path.read_text().split()[0])

    def ncclGetVersion(self, code):
        code._obj.value = self.code
        return 0

def CDLL(name, *arguments, **options):
    path = machine / "lib" / pathlib.Path(name or "libc").name
    if "libnccl.so" in str(name):
        return Library(pathlib.Path(name))
    if path.exists():
        return map_file(path)
    if pathlib.Path(name or "libc").name.startswith(("libmlx5", "libnccl-net")):
        raise OSError(f"{name}: cannot open shared object file")
    return load(name, *arguments, **options)

ctypes.CDLL = CDLL

import megatron_ep_v2.cuda_toolkit as cuda_toolkit
import megatron_ep_v2.doctor.host as host
host.INFINIBAND, host.MOUNTS, host.MODULES = machine / "infiniband", machine / "mounts", machine / "modules"
cuda_toolkit.SYSTEM = machine / "no-cuda"
"""

TORCH = """
import json, pathlib, sys, types, warnings
import sitecustomize
spec = json.loads((pathlib.Path(__file__).parent / "spec.json").read_text())
for library in spec["libraries"]:
    sitecustomize.map_file(sitecustomize.machine / library)
__version__ = spec["version"]
version = types.SimpleNamespace(cuda=spec["cuda"])

def is_available():
    if spec["warning"]:
        warnings.warn(spec["warning"])
    return bool(spec["devices"])

cuda = types.SimpleNamespace(
    is_available=is_available,
    device_count=lambda: len(spec["devices"]),
    get_device_name=lambda device: spec["devices"][device][0],
    get_device_capability=lambda device: tuple(spec["devices"][device][1]),
    nccl=types.SimpleNamespace(version=lambda: tuple(spec["nccl"])),
)
"""

FUSED_A2A = """
try:
    from deep_ep import Buffer
    from deep_ep.utils import EventOverlap
    HAVE_DEEP_EP = True
except ImportError:
    HAVE_DEEP_EP = False
class FusedDispatch:
    @staticmethod
    def forward(ctx, x, token_indices, token_probs, num_experts, group, async_finish, allocate_on_comm_stream): ...
class FusedCombine:
    @staticmethod
    def forward(ctx, x, group, handle, async_finish, allocate_on_comm_stream): ...
fused_dispatch = fused_combine = set_deepep_num_sms = None
"""

TOKEN_DISPATCHER = """
from megatron.core.transformer.moe.fused_a2a import fused_combine, fused_dispatch, set_deepep_num_sms
class _DeepepManager:
    def __init__(self, group, num_local_experts, router_topk, num_experts, config): ...
    def setup_metadata(self, routing_map, probs): ...
    def dispatch(self, hidden_states, async_finish, allocate_on_comm_stream): ...
    def combine(self, hidden_states, async_finish, allocate_on_comm_stream): ...
    def get_permuted_hidden_states_by_experts(self, hidden_states): ...
    def get_restored_hidden_states_by_experts(self, hidden_states): ...
    def get_number_of_tokens_per_expert(self): ...
class MoETokenDispatcher:
    def __init__(self, config, pg_collection): ...
class MoEFlexTokenDispatcher(MoETokenDispatcher):
    def dispatch_preprocess(self, hidden_states, routing_map, probs): ...
    def combine_postprocess(self, hidden_states): ...
def get_align_size_for_quantization(config): ...
"""

CHECKPOINT = """
class CheckpointFunction:
    @staticmethod
    def forward(ctx, run_function, distribute_saved_activations, *args): ...
"""

MOE_LAYER = """
class MoELayer:
    def __init__(self, config, submodules, layer_number, pg_collection, is_mtp_layer=False): ...
"""

OPTIMIZER = """
class DistributedOptimizer:
    def sharded_param_state_dp_reshardable(self, model_sharded_state_dict, is_loading, metadata): ...
"""

OPTIMIZERS = """
class ChainedOptimizer:
    def step(self): ...

class MixedPrecisionOptimizer(ChainedOptimizer): ...

class FP32Optimizer(ChainedOptimizer): ...
"""

DIST_CHECKPOINTING = "def load(sharded_state_dict, checkpoint_dir, strict=None): ...\n"

SCHEDULE = "def should_free_input(name, is_moe, config, num_local_experts): ...\n"

V1 = "__version__ = '1.2.1'\nclass Buffer: ...\n"
HYBRID_EP = "class Buffer: ...\nclass HybridEPBuffer: ...\n__version__ = '1.2.1+hybrid'\n"
V2_0 = (
    "__version__ = '2.0.0'\nclass Buffer: ...\nclass ElasticBuffer:\n    def dispatch(self, x, do_expand=False): ...\n"
)
V2_1 = V2_0.replace("2.0.0", "2.1.0").replace("do_expand=False", "do_expand=False, do_zero_padding=False")
V2_5 = (
    "__version__ = '2.5.0'\nclass EPBuffer:\n    def dispatch(self, x, do_expand=False, do_zero_padding=False): ...\n"
)

DEEP_EP, DEEP_EP_V25 = "deep_ep/__init__.py", "deep_ep_v25/__init__.py"
WHEEL_2_1, WHEEL_2_5 = "sgl-deep-ep==0.1.2.post1", "sgl-deep-ep-v25==0.1.0rc0"  # both for torch 2.14.1
NCCL_HEADER = "#define NCCL_MAJOR {}\n#define NCCL_MINOR {}\n#define NCCL_PATCH {}\n"

H200 = {"name": "NVIDIA H200", "sm": "9.0"}


def says(version: str) -> str:
    """A program of a CUDA toolkit, as a script that says its version."""
    return f"echo 'Cuda compilation tools, release {version}, V{version}.88'"


@dataclass
class Machine:
    """Eight H200 with NVLink, no RDMA, and deep_ep 2.1.0: everything in order. A test changes one thing.

    Attributes:
        gpus: As nvidia-smi lists them.
        link: Between each two of them, as nvidia-smi has it.
        torch: What the stand-in for torch says; None = not installed.
        modules: Source by path below the folder of packages.
        wheels: "distribution==version" by import name, of packages that are there.
        nvcc, cuobjdump: Their versions; None = there is none.
        files: Content by path; below nccl, cudart and lib shared libraries, which a stand-in maps into memory.
        programs: Shell script by path.
        environment: Variables.
        site: What every process runs first, after what makes this machine.
    """

    folder: Path
    gpus: list[dict[str, str]] = field(default_factory=lambda: [H200] * 8)
    link: str = "NV18"
    torch: dict[str, Any] | None = field(
        default_factory=lambda: {
            "version": "2.11.0+cu130",
            "cuda": "13.0",
            "nccl": [2, 28, 9],
            "devices": [["NVIDIA H200", [9, 0]]] * 8,
            "warning": "",
            "libraries": ["nccl/lib/libnccl.so.2", "cudart/libcudart.so.13"],
        }
    )
    modules: dict[str, str] = field(
        default_factory=lambda: {
            DEEP_EP: V2_1,
            "megatron/core/__init__.py": "__version__ = '0.19.2'",
            "megatron/core/transformer/moe/fused_a2a.py": FUSED_A2A,
            "megatron/core/transformer/moe/token_dispatcher.py": TOKEN_DISPATCHER,
            "megatron/core/tensor_parallel/__init__.py": "",
            "megatron/core/tensor_parallel/random.py": CHECKPOINT,
            "megatron/core/models/common/utils.py": SCHEDULE,
            "megatron/core/transformer/moe/moe_layer.py": MOE_LAYER,
            "megatron/core/optimizer/distrib_optimizer.py": OPTIMIZER,
            "megatron/core/optimizer/optimizer.py": OPTIMIZERS,
            "megatron/core/dist_checkpointing/__init__.py": DIST_CHECKPOINTING,
        }
    )
    wheels: dict[str, str] = field(default_factory=lambda: {"deep_ep": "tokenspeed-deepep==2.1.0.post20260801"})
    nvcc: str | None = "13.0"
    cuobjdump: str | None = "13.0"
    files: dict[str, str] = field(
        default_factory=lambda: {
            "nccl/lib/libnccl.so.2": "23004",
            "nccl/include/nccl.h": NCCL_HEADER.format(2, 30, 4),
            "cudart/libcudart.so.13": "13000",
        }
    )
    programs: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    site: str = ""  # more for sitecustomize

    def without_gpus(self) -> Machine:
        """A laptop: no GPU, torch's CPU build, no deep_ep."""
        assert self.torch
        self.gpus, self.nvcc, self.cuobjdump = [], None, None
        self.torch |= {"version": "2.11.0+cpu", "cuda": None, "devices": [], "libraries": []}
        del self.modules[DEEP_EP]
        return self

    def put_deep_ep(self, *packages: tuple[str, str, str | None], nccl: tuple[int, int, int]) -> Machine:
        """Torch 2.14.1 with an nvcc and an NCCL for these packages of DeepEP: (file, source, wheel), and no others."""
        assert self.torch
        self.torch["version"], self.nvcc = "2.14.1+cu130", "13.1"
        for file in (DEEP_EP, DEEP_EP_V25):
            self.modules.pop(file, None)
        self.wheels = {}
        for file, source, wheel in packages:
            self.modules[file] = source
            if wheel:
                self.wheels[file.partition("/")[0]] = wheel
        self.files["nccl/lib/libnccl.so.2"] = str(nccl[0] * 10000 + nccl[1] * 100 + nccl[2])
        self.files["nccl/include/nccl.h"] = NCCL_HEADER.format(*nccl)
        return self

    def add_rdma(self, name: str = "mlx5_0", vendor: str = "0x15b3", state: str = "4: ACTIVE") -> None:
        """An RDMA device with one port; with it libmlx5, ibstat and GDRCopy's module."""
        self.files[f"infiniband/{name}/device/vendor"] = f"{vendor}\n"
        for file, text in (("state", state), ("link_layer", "InfiniBand"), ("rate", "400 Gb/sec (4X NDR)")):
            self.files[f"infiniband/{name}/ports/1/{file}"] = f"{text}\n"
        self.files.setdefault("modules/gdrdrv/version", "2.5.1\n")
        self.files.setdefault("lib/libmlx5.so.1", "0 MLX5_1.9\0MLX5_1.25\0")
        self.programs.setdefault("bin/ibstat", "")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`python -m megatron_ep_v2 doctor arguments` on this machine."""
        self._build()
        environment = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.folder / "home"),
            "PYTHONPATH": os.pathsep.join([str(self.folder / "site"), str(ROOT)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_HOME": str(self.folder / "cuda"),
            **self.environment,
        }
        command = [sys.executable, "-m", "megatron_ep_v2", "doctor", *arguments]
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=HANG, check=False
        )

    def report(self) -> Report:
        """The same with --json."""
        done = self.run("--json")
        assert done.stdout, done.stderr
        document = json.loads(done.stdout)
        return Report(
            done.returncode, document["usable"], {each["name"]: each for each in document["checks"]}, document
        )

    def _build(self) -> None:
        files = {"home/.keep": "", "bin/.keep": "", **self.files, "site/sitecustomize.py": SITE + self.site}
        files |= {f"site/{name}": text for name, text in self.modules.items()}
        if self.torch is not None:
            files |= {"site/torch/__init__.py": TORCH, "site/torch/spec.json": json.dumps(self.torch)}
        for path in [Path(name) for name in self.modules]:
            for parent in path.parents[:-1]:
                files.setdefault(f"site/{parent}/__init__.py", "")
        for package, wheel in self.wheels.items():
            if any(name.startswith(f"{package}/") for name in self.modules):
                name, _, version = wheel.partition("==")
                info = f"site/{name.replace('-', '_')}-{version}.dist-info"
                files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                files[f"{info}/top_level.txt"] = f"{package}\n"
        programs = dict(self.programs)
        if self.gpus:
            programs.setdefault("bin/nvidia-smi", self._nvidia_smi())
        if self.nvcc:
            programs.setdefault("cuda/bin/nvcc", says(self.nvcc))
        if self.cuobjdump:
            programs.setdefault("cuda/bin/cuobjdump", says(self.cuobjdump))
        files |= {name: f"#!/bin/sh\n{script}\n" for name, script in programs.items()}
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755 if name in programs else 0o644)

    def _nvidia_smi(self) -> str:
        rows = "\n".join(f"{gpu['name']}, {gpu['sm']}, 580.159" for gpu in self.gpus)
        count = range(len(self.gpus))
        header = "\t".join(["", *(f"\x1b[4mGPU{i}" for i in count), "CPU Affinity\x1b[0m"])
        matrix = [
            header,
            *("\t".join([f"GPU{i}", *("X" if i == j else self.link for j in count), "0-55"]) for i in count),
        ]
        text = {"--query-gpu": rows, "topo": "\n".join(matrix), "": "Driver Version: 580.159   CUDA Version: 13.0"}
        return "\n".join(
            ["case $1 in", *(f"{key}*) cat <<'END'\n{value}\nEND\n;;" for key, value in text.items()), "esac"]
        )


@dataclass(frozen=True)
class Report:
    """What `doctor --json` gave.

    Attributes:
        code: The exit status.
        checks: By name, as JSON has them.
    """

    code: int
    usable: str
    checks: dict[str, dict[str, str]]
    document: dict[str, Any]

    def statuses(self) -> dict[str, str]:
        """By name."""
        return {name: check["status"] for name, check in self.checks.items()}
