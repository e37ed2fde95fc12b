"""Megatron-Bridge's own provider on two ranks: its code from the registry's wheel, without what that depends on.

The wheel (2 MB) is downloaded once into pytest's cache, as `tests/cli/test_patch.py` does with Megatron's. The packages
`megatron.bridge` and `megatron.bridge.models` are stand-ins that run nothing, because their own import every model of
Hugging Face's transformers; omegaconf is one for the import's sake. What is used is Bridge's: the provider and its
configuration, the gate by the GPU's name, the model with Megatron's DDP. The layers are those that run on a CPU.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from qwen3_moe.options import parse_options

import megatron_ep_v2
from megatron_ep_v2.megatron.qwen3_moe import cpu, model
from tests.frameworks.test_start_up import snippets
from tests.helpers.harness import HANG, run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.megatron_training import ARGUMENTS, on_cpu
from tests.helpers.reports import log_records
from tests.helpers.shapes import Split
from tests.megatron.test_dispatchers import take

VERSION = "0.6.2"
SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 16}
SIZES |= {"ffn_hidden_size": 16, "moe_ffn_hidden_size": 16, "num_moe_experts": 8, "moe_router_topk": 3}
SIZES |= {"seq_length": 12, "vocab_size": 256}


@pytest.fixture(scope="module")
def bridge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its source."""
    cache = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    wheels = cache.mkdir("wheels") if cache else tmp_path_factory.mktemp("wheels")
    if not list(wheels.glob(f"megatron_bridge-{VERSION}-*.whl")):
        download = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels)]
        done = [sys.executable, *download, f"megatron-bridge=={VERSION}"]
        subprocess.run(done, timeout=HANG, check=True)
    (wheel,) = wheels.glob(f"megatron_bridge-{VERSION}-*.whl")
    folder = tmp_path_factory.mktemp("bridge")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def import_bridge(folder: Path) -> tuple[Any, Any]:
    """(its module of the provider, its module of the gate), in a process of its own."""
    for name in ("megatron.bridge", "megatron.bridge.models"):
        package: Any = ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    if importlib.util.find_spec("omegaconf") is None:
        sys.modules["omegaconf"] = mock.Mock(__spec__=None)
    names = "megatron.bridge.models.gpt_provider", "megatron.bridge.training.flex_dispatcher_backend"
    provider, gate = map(importlib.import_module, names)
    return provider, gate


def on_a_cpu(models: list[Any]) -> list[Any]:
    """Bridge's hook before it wraps the model."""
    for each in models:
        each.rotary_pos_emb = cpu.CpuRotaryEmbedding(16, 1.0, use_cpu_initialization=True)
    return models


def refusal_of_flex(gate: Any) -> str:
    """What Bridge's own check of a configuration says of the flex dispatcher set by hand."""
    config = SimpleNamespace(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep")
    try:
        gate.validate_flex_dispatcher_backend(config)
    except ValueError as error:
        return str(error)
    return ""


def train(group: Any, folder: Path, gpu: str) -> dict[str, Any]:
    """Three steps on one batch, by way of a recipe: alltoall with the flex dispatcher's backend, the gate, the
    provider. The sizes of batches are known to Megatron, as from Bridge's initialisation.

    Args:
        gpu: The name that the gate sees; "" = there is none.
    """
    cpu.substitute_alltoall_dispatcher()
    provider_module, gate = import_bridge(folder)
    spec = model.megatron_layer_spec(parse_options(ARGUMENTS).shape, torch.device("cpu"))
    with on_cpu(), process_groups(Split(1, 2)), log_records() as seen:
        megatron_ep_v2.install(buffer="reference")
        init_num_microbatches_calculator(
            group.rank(), None, global_batch_size=4, micro_batch_size=2, data_parallel_size=2
        )
        provider = provider_module.GPTModelProvider(
            **SIZES,
            transformer_layer_spec=spec,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            qk_layernorm=True,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="alltoall",
            moe_flex_dispatcher_backend="deepep",
            expert_model_parallel_size=2,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            cross_entropy_loss_fusion=False,
        )
        properties = SimpleNamespace(major=10 if "B" in gpu else 9, name=gpu)
        with (
            mock.patch.object(torch.cuda, "is_available", lambda: bool(gpu)),
            mock.patch.object(torch.cuda, "get_device_properties", lambda _: properties),
        ):
            gate.apply_flex_dispatcher_backend(provider, provider.moe_flex_dispatcher_backend)
            refused = "" if not gpu else refusal_of_flex(gate)
        provider.finalize()
        provider.register_pre_wrap_hook(on_a_cpu)
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        (ddp,) = provider.provide_distributed_model(ddp_config=ddp_config, use_cpu_initialization=True)
        config = OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.5, bf16=False, fp16=False)
        optimizer = get_megatron_optimizer(config, [ddp])
        tokens = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(group.rank()))
        losses = []
        for _ in range(3):
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            positions = torch.arange(12).expand(2, 12)
            loss = ddp(tokens[:, :-1], positions, attention_mask=None, labels=tokens[:, 1:].contiguous()).mean()
            loss.backward()
            finalize_model_grads([ddp])
            assert optimizer.step()[0]
            losses.append(loss.item())
        status = megatron_ep_v2.status()
        buffers = [(each["class"], each["num_max_tokens_per_rank"]) for each in status["buffers"]]
        return {
            "losses": losses,
            "layers": status["moe_layers"],
            "buffers": buffers,
            "said": take(seen),
            "refused": refused,
        }


needs_its_python = pytest.mark.skipif(sys.version_info < (3, 12), reason=f"Megatron-Bridge {VERSION} needs Python 3.12")


@needs_its_python
def test_the_page_names_what_it_has(bridge: Path) -> None:
    imports = re.findall(r"^from (megatron\.bridge\.\S+) import (\w+)", snippets("Megatron-Bridge"), re.MULTILINE)
    assert len(imports) == 3
    for module, name in imports:
        path = bridge / module.replace(".", "/")
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert re.search(rf"\b{name}\b", source.read_text()), f"{module} has no {name}"


@pytest.mark.slow
@needs_its_python
@pytest.mark.parametrize("gpu", ["", "NVIDIA H200", "NVIDIA GB200"])
def test_its_provider_trains(gpu: str, bridge: Path) -> None:
    pytest.importorskip("yaml", reason="pip install pyyaml")
    ranks = run_ranks(2, train, bridge, gpu, fresh=True)
    for rank, found in enumerate(ranks):
        losses = found.pop("losses")
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.99 * losses[0], losses
        if gpu != "NVIDIA GB200":
            capacity = "24 (the model's seq_length and the micro-batch size)"
            assert (found["layers"], found["buffers"]) == ("2 dispatch through it", [("ReferenceBuffer", capacity)])
            assert found["said"] == [] and found["refused"] == ""
            continue
        built = "2 built with moe_token_dispatcher_type=alltoall"
        assert found["layers"] == f"no MoE layer dispatches through it: {built}" and found["buffers"] == []
        assert [built in message for message in found["said"]] == [True] * (rank == 0)
        assert "Current GPU: NVIDIA GB200" in found["refused"]
