"""Qwen3-MoE as a Megatron-Core GPTModel: configuration, layer spec, initialisation, parameter names."""

from __future__ import annotations

import copy
import importlib.util
import math
import re
import zlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ep_v2.megatron.experts import use_experts
from megatron_ep_v2.megatron.qwen3_moe import cpu
from megatron_ep_v2.megatron.qwen3_moe.options import ModelShape, TrainerOptions

INIT_STD = 0.02
EXPERT_NAME = re.compile(r"(.*\.experts)(?:\.local_experts\.(\d+)(\..*)|(\..*\.weight)(\d+))")


def have_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def torch_dtype(options: TrainerOptions, device: torch.device) -> torch.dtype:
    """bf16 on GPUs and fp32 on the CPU, unless chosen."""
    name = options.dtype if options.dtype != "auto" else ("bf16" if device.type == "cuda" else "fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def rows_dtype(options: TrainerOptions, device: torch.device) -> torch.dtype:
    """Of the rows that go to experts and come back: as the model, but on the CPU bf16 too unless fp32 was chosen."""
    return torch.bfloat16 if options.dtype == "auto" else torch_dtype(options, device)


def transformer_config(options: TrainerOptions, device: torch.device, world: int) -> TransformerConfig:
    """The Qwen3-MoE architecture on `world` expert-parallel ranks, TP = PP = 1."""
    shape, dtype, on_gpu = options.shape, torch_dtype(options, device), device.type == "cuda"
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        ffn_hidden_size=shape.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=shape.num_experts,
        moe_ffn_hidden_size=shape.moe_ffn_hidden_size,
        moe_router_topk=shape.topk,
        moe_router_pre_softmax=False,  # softmax over the chosen experts
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=options.recipe.aux_loss_coeff,
        moe_token_dispatcher_type=options.dispatcher,
        moe_flex_dispatcher_backend="deepep",
        moe_grouped_gemm=on_gpu and have_transformer_engine(),
        moe_permute_fusion=options.permute_fusion,
        moe_shared_expert_intermediate_size=options.shared_expert_ffn or None,
        moe_shared_expert_overlap=options.shared_expert_overlap,
        expert_model_parallel_size=world,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,  # `initialise` does it
        bias_activation_fusion=on_gpu,
        apply_rope_fusion=on_gpu and have_transformer_engine(),  # as Megatron's arguments have it
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # but see `with_fused_gradients`
        **(recompute if options.recompute and on_gpu else {}),
    )


def layer_spec(options: TrainerOptions, device: torch.device) -> ModuleSpec:
    """TransformerEngine's modules on GPUs where it is installed, else Megatron's local ones; experts as chosen."""
    spec = megatron_layer_spec(options.shape, device)
    if options.experts != "megatron":
        use_experts(spec, options.experts)
    return spec


def megatron_layer_spec(shape: ModelShape, device: torch.device) -> ModuleSpec:
    """The same with Megatron's own experts."""
    if device.type == "cuda" and have_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=shape.num_experts, moe_grouped_gemm=True, qk_layernorm=True
        )
        spec.module = with_fused_gradients(spec.module)
        return spec
    spec = get_gpt_layer_local_spec(
        num_experts=shape.num_experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
    )
    if device.type == "cpu":
        moe_submodules(spec).router = cpu.CpuRouter
        spec.submodules.self_attention.submodules.core_attention = cpu.CpuCoreAttention
    return spec


def moe_submodules(spec: ModuleSpec) -> MoESubmodules:
    """Those of a layer."""
    mlp = spec.submodules.mlp  # a ModuleSpec, from megatron-core 0.18 on a functools.partial
    return mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]


def with_fused_gradients(layer: type) -> type:
    """A transformer layer whose linears add weight gradients to `main_grad` in the GEMM, as Megatron's training has it.

    TransformerEngine's linears and megatron_ep_v2's experts can. Megatron's own cannot without apex and refuse to be
    built, and GPTModel's output layer is one of them; so the layers alone have `gradient_accumulation_fusion` set.
    """

    class FusedGradients(layer):  # type: ignore[misc, valid-type]
        def __init__(self, config: TransformerConfig, *args: object, **kwargs: object):
            config = copy.copy(config)
            config.gradient_accumulation_fusion = True
            super().__init__(config, *args, **kwargs)

    return FusedGradients


def build_model(options: TrainerOptions, device: torch.device, rank: int, world: int) -> GPTModel:
    """The rank's part of the model: all dense parameters and `num_experts / world` experts of each layer.

    With `--dispatcher flex`, `megatron_ep_v2.install()` has to come first.
    """
    if device.type == "cpu" and options.dispatcher == "alltoall":
        cpu.substitute_alltoall_dispatcher()
    model = GPTModel(
        config=transformer_config(options, device, world),
        transformer_layer_spec=layer_spec(options, device),
        vocab_size=options.shape.vocab_size,
        max_sequence_length=options.shape.seq_length,
        position_embedding_type="rope",
        rotary_base=1_000_000,
        share_embeddings_and_output_weights=False,
    )
    if device.type == "cpu":
        model.rotary_pos_emb = cpu.CpuRotaryEmbedding(
            kv_channels=options.shape.kv_channels,
            rotary_percent=1.0,
            rotary_base=1_000_000,
            use_cpu_initialization=True,
        )
    model.to(device=device, dtype=torch_dtype(options, device))
    if rows_dtype(options, device) != torch_dtype(options, device):
        cpu.send_rows_as(model, rows_dtype(options, device))
    num_local_experts = options.shape.num_experts // world
    parameters = named_parameters(model, rank, num_local_experts)
    initialise(one_by_one(parameters, rank, num_local_experts), options)
    return model


def named_parameters(model: GPTModel, rank: int, num_local_experts: int) -> dict[str, torch.nn.Parameter]:
    """Parameters by a name that is the same for every expert-parallel size: experts by their global number.

    Megatron's `...experts.local_experts.3.linear_fc1.weight` (local modules) and `...experts.linear_fc1.weight3`
    (TransformerEngine's grouped ones) both become `...experts.11.linear_fc1.weight` on rank 1 of 8 experts each.
    megatron_ep_v2's `...experts.linear_fc1.weight`, all experts of a rank in one, keeps its name.
    """

    def global_name(name: str) -> str:
        match = EXPERT_NAME.fullmatch(name)
        if match is None:
            return name
        prefix, local_module, suffix, grouped_suffix, local_grouped = match.groups()
        expert = rank * num_local_experts + int(local_module or local_grouped)
        return f"{prefix}.{expert}{suffix or grouped_suffix}"

    return {global_name(name): parameter for name, parameter in model.named_parameters()}


def one_by_one(tensors: Mapping[str, torch.Tensor], rank: int, num_local_experts: int) -> dict[str, torch.Tensor]:
    """The same with every expert by itself: stacked ones as views, under the names that other experts have."""
    first, single = rank * num_local_experts, dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        prefix, stacked, rest = name.partition(".experts.linear")
        if stacked:
            single |= {f"{prefix}.experts.{first + i}.linear{rest}": part for i, part in enumerate(tensor.detach())}
        else:
            single[name] = tensor
    return single


@torch.no_grad()
def initialise(parameters: Mapping[str, torch.Tensor], options: TrainerOptions) -> None:
    """Norms 1; matrices normal, each from the seed and its own name: the same model on any number of ranks."""
    output_std = INIT_STD / math.sqrt(2 * options.shape.num_layers)
    for name, parameter in parameters.items():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{options.seed}/{name}".encode()))
        std = output_std if "linear_proj" in name or "linear_fc2" in name else INIT_STD
        parameter.copy_(torch.empty_like(parameter, dtype=torch.float32).normal_(0.0, std, generator=generator))
