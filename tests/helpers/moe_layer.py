"""Megatron's whole MoE layer (router, dispatcher, experts) as its models build it: on GPUs with TransformerEngine's
grouped experts, on the CPU with sequential ones; and the features that have to hold whatever carries the tokens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_ep_v2
from megatron_ep_v2.buffers.pool import buffers
from megatron_ep_v2.megatron.experts import EXPERTS
from megatron_ep_v2.megatron.qwen3_moe import cpu
from tests.helpers import mcore  # noqa: F401  (quiets Megatron's import, finds the examples)
from tests.helpers.progress import say


@dataclass(frozen=True)
class Machine:
    """What the layer runs on, and its size there."""

    device: str
    buffer: str
    dtype: torch.dtype
    tokens: int
    hidden: int
    ffn: int
    experts: int
    topk: int

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


# fp32: what is compared is the routing of tokens and gradients, and not how bf16 rounds.
CPU = Machine("cpu", "reference", torch.float32, tokens=32, hidden=64, ffn=32, experts=8, topk=3)
GPU = Machine("cuda", "elastic", torch.bfloat16, tokens=4096, hidden=2048, ffn=768, experts=128, topk=8)

SHARED = {"moe_shared_expert_intermediate_size": 32}
SELECTIVE = {"recompute_granularity": "selective"}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "three micro-batches in flight": {"micro_batches": 3},
    "uneven, one rank without a token": {"tokens_of_rank_1": 0},
    "capacity factor": {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"},
    "router in fp64": {"moe_router_dtype": "fp64"},
    "shared experts": SHARED,
}
GPU_FEATURES: dict[str, dict[str, Any]] = {
    **{name: feature for name, feature in FEATURES.items() if name != "uneven, one rank without a token"},
    # Megatron 0.19.2's own router cannot reshape the logits of no token (RouterGatingLinearFunction: view(0, 1, -1)).
    "uneven, one rank with a single token": {"tokens_of_rank_1": 1},
    # Megatron's own code for these needs CUDA streams, generators or grouped GEMMs.
    "shared experts, overlapped": {**SHARED, "moe_shared_expert_overlap": True},
    "whole layer recomputed": {**SELECTIVE, "recompute_modules": ["moe"]},
    "activation recomputed": {**SELECTIVE, "recompute_modules": ["moe_act"]},
    "sequential experts": {"moe_grouped_gemm": False},
}


@contextlib.contextmanager
def megatron(machine: Machine) -> Iterator[None]:
    """Megatron's process groups over all ranks, expert parallel; nothing of them is left behind."""
    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks, expert_tensor_parallel_size=1)
    if machine.on_gpu:
        model_parallel_cuda_manual_seed(1)
    with torch.compiler.set_stance("force_eager"):  # Megatron compiles small functions, again for each layer
        try:
            yield
        finally:
            megatron_ep_v2.uninstall()
            parallel_state.destroy_model_parallel()


def use(machine: Machine, dispatcher: str, layout: str = "expanded") -> None:
    """From now on layers are built with this dispatcher; "flex" is on this package's buffer in this layout ("sync-free"
    is one). Destroys the buffer that was in use."""
    megatron_ep_v2.uninstall()
    if dispatcher == "flex":  # one capacity, so one set of kernels
        mode: dict[str, Any] = {"sync_free": True} if layout == "sync-free" else {"layout": layout}
        megatron_ep_v2.install(buffer=machine.buffer, num_max_tokens_per_rank=machine.tokens, **mode)
    elif not machine.on_gpu:
        cpu.substitute_alltoall_dispatcher()


def make_layer(
    machine: Machine, dispatcher: str, layout: str = "expanded", experts: str | None = None, **more: Any
) -> Any:
    """`use` and `build_layer` in one: on a new buffer."""
    use(machine, dispatcher, layout)
    return build_layer(machine, dispatcher, experts, **more)


def build_layer(machine: Machine, dispatcher: str, experts: str | None = None, **more: Any) -> Any:
    """A MoELayer with the same weights every time, on the buffer that is there. experts: one of
    `megatron.experts.EXPERTS`; None = Megatron's own."""
    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": machine.hidden,
        "num_attention_heads": 8,
        "ffn_hidden_size": machine.ffn,
        "moe_ffn_hidden_size": machine.ffn,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "bf16": machine.dtype == torch.bfloat16,
        "params_dtype": machine.dtype,
        "num_moe_experts": machine.experts,
        "moe_router_topk": machine.topk,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": machine.on_gpu,
        "moe_permute_fusion": machine.on_gpu,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": not machine.on_gpu,
        "moe_token_dispatcher_type": dispatcher,
        "moe_flex_dispatcher_backend": "deepep",
        "expert_model_parallel_size": dist.get_world_size(),
    }
    config = TransformerConfig(**values | more)
    spec = get_moe_module_spec(
        use_te=machine.on_gpu, num_experts=machine.experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    submodules = spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]
    if not machine.on_gpu:
        submodules.router = cpu.CpuRouter
    if experts is not None:
        submodules.experts = EXPERTS[experts]
    build = functools.partial(build_module, spec) if isinstance(spec, ModuleSpec) else spec
    layer = build(config=config, layer_number=1).to(machine.device)
    generator = torch.Generator(machine.device)
    for name, parameter in sorted(layer.named_parameters()):
        own = dist.get_rank() if ".experts." in f".{name}" else 0  # each rank has experts of its own
        generator.manual_seed(1000 * own + sum(name.encode()))
        parameter.data.normal_(0.0, 0.02, generator=generator)
    return layer


def hidden_states(machine: Machine, tokens: int) -> torch.Tensor:
    """[tokens, 1, H], different on every rank."""
    generator = torch.Generator(machine.device).manual_seed(dist.get_rank())
    hidden = torch.randn(tokens, 1, machine.hidden, generator=generator, device=machine.device)
    return hidden.to(machine.dtype)


def step(layer: Any, hidden: torch.Tensor, micro_batches: int = 1) -> dict[str, torch.Tensor]:
    """Output and gradients; several micro-batches are all in flight before the first backward."""
    layer.zero_grad(set_to_none=True)
    inputs = [(hidden * (1 + i)).detach().requires_grad_() for i in range(micro_batches)]
    outputs = [layer(x)[0] for x in inputs]
    for y in reversed(outputs):
        y.backward(torch.ones_like(y))
    tensors = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    tensors |= {f"gradient of x {i}": x.grad for i, x in enumerate(inputs)}
    return tensors | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def compare_with_alltoall(
    group: Any, machine: Machine, features: dict[str, dict[str, Any]], layouts: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """ "feature, layout" -> tensor -> relative L2 distance between the flex dispatcher and Megatron's alltoall. All
    features of a layout share one buffer, as the layers of a model do."""
    errors = {}
    with megatron(machine):
        use(machine, "alltoall")
        theirs = {}
        for name, feature in features.items():
            say(f"alltoall: {name}", group)
            theirs[name] = _run_feature(group, machine, "alltoall", feature)
        for layout in layouts:
            use(machine, "flex", layout)
            for name, feature in features.items():
                say(f"{layout}: {name}", group)
                ours = _run_feature(group, machine, "flex", feature)
                assert ours.keys() == theirs[name].keys(), ours.keys() ^ theirs[name].keys()
                errors[f"{name}, {layout}"] = {key: _distance(ours[key], theirs[name][key]) for key in ours}
            assert len(buffers()) == 1
            say(f"{layout}: destroy the buffer", group)
            megatron_ep_v2.destroy_buffers()
    return errors


def _run_feature(group: Any, machine: Machine, dispatcher: str, feature: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A training step, and "eval": the output without gradients (alltoall's is the one that it trained with)."""
    more = dict(feature)
    micro_batches, tokens_of_rank_1 = more.pop("micro_batches", 1), more.pop("tokens_of_rank_1", None)
    tokens = machine.tokens // 8
    if tokens_of_rank_1 is not None:
        tokens = tokens_of_rank_1 if group.rank() == 1 else tokens - group.rank() % 3
    hidden = hidden_states(machine, tokens)
    layer = build_layer(machine, dispatcher, **more)
    results = step(layer, hidden, micro_batches)
    if dispatcher == "alltoall":
        return results | {"eval": results["output 0"]}
    layer.eval()
    with torch.no_grad():
        return results | {"eval": layer(hidden)[0]}


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    difference, size = (ours.double() - theirs.double()).norm().item(), theirs.double().norm().item()
    return difference / size if size else difference
