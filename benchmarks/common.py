"""What the benchmarks share: the environment header of a results file, and Megatron's dispatchers on their own."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep_v2.probe import loaded_nccl_version, probe

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # for the CPU substitutions of Megatron


def environment(script: str) -> dict[str, Any]:
    """Hardware, versions, commit and command: the first row of every results file."""
    header: dict[str, Any] = {"environment": True, "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        header |= {
            "gpu": f"{torch.cuda.device_count()} x {gpu.name}",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "cuda": torch.version.cuda,
            "nccl": loaded_nccl_version(),
            "deep_ep": probe().version,
            "transformer_engine": _version("transformer-engine"),
        }
    else:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        header["cpu"] = f"{len(names)} x {names[0].partition(':')[2].strip()}" if names else platform.processor()
    header["megatron_core"] = _version("megatron-core")
    header["commit"] = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    header["command"] = " ".join([script, *sys.argv[1:]])
    return header


def write_rows(path: Path | None, header: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """A JSONL file, header first; and one JSON document as the last line on stdout."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    print(json.dumps({"environment": header, "rows": list(rows)}))


def make_dispatcher(kind: str, *, hidden: int, experts: int, topk: int, **config: Any) -> Any:
    """Megatron's "flex" or "alltoall" token dispatcher over the whole world, outside any model."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    rank, ranks = dist.get_rank(), dist.get_world_size()
    groups = ProcessGroupCollection()
    groups.ep = groups.tp_ep = dist.group.WORLD
    groups.tp = groups.expt_tp = dist.new_group([rank], use_local_synchronization=True)
    values = {
        "num_layers": 1,
        "hidden_size": hidden,
        "num_attention_heads": 8,
        "num_moe_experts": experts,
        "moe_router_topk": topk,
        "moe_token_dispatcher_type": kind,
        "moe_flex_dispatcher_backend": "deepep",
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": ranks,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "add_bias_linear": False,
    }
    num_local = experts // ranks
    cls = token_dispatcher.MoEFlexTokenDispatcher if kind == "flex" else token_dispatcher.MoEAlltoAllTokenDispatcher
    local = list(range(rank * num_local, (rank + 1) * num_local))
    return cls(num_local, local, TransformerConfig(**values | config), groups)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
