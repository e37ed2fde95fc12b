"""Megatron's whole MoE layer (router, dispatcher, TransformerEngine's grouped experts) on GPUs: the expanded layout
beside Megatron's alltoall, feature by feature; and what one forward + backward launches, waits for and holds."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from torch.profiler import ProfilerActivity, profile

import megatron_ep_v2

pytest.importorskip("transformer_engine.pytorch", reason="needs TransformerEngine's grouped GEMM")

RANKS = torch.cuda.device_count()
TOKENS, HIDDEN, FFN, EXPERTS, TOPK = 4096, 2048, 768, 128, 8  # Qwen3-30B-A3B
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}

pytestmark = pytest.mark.timeout(500)


@contextlib.contextmanager
def megatron(group: Any) -> Iterator[None]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=group.size(), expert_tensor_parallel_size=1, tensor_model_parallel_size=1
    )
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        megatron_ep_v2.uninstall()
        parallel_state.destroy_model_parallel()


def make_layer(dispatcher: str, layout: str = "expanded", **more: Any) -> Any:
    """A MoELayer; with "flex", on ElasticBuffer in this layout. The same weights every time."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 8,
        "ffn_hidden_size": FFN,
        "moe_ffn_hidden_size": FFN,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_token_dispatcher_type": dispatcher,
        "moe_flex_dispatcher_backend": "deepep",
        "expert_model_parallel_size": torch.distributed.get_world_size(),
    }
    megatron_ep_v2.uninstall()
    if dispatcher == "flex":
        megatron_ep_v2.install(buffer="elastic", layout=layout, num_max_tokens_per_rank=TOKENS)  # one set of kernels
    torch.manual_seed(1)
    config = TransformerConfig(**values | more)
    spec = get_moe_module_spec(use_te=True, num_experts=EXPERTS, moe_grouped_gemm=config.moe_grouped_gemm)
    build = spec if isinstance(spec, functools.partial) else functools.partial(build_module, spec)
    layer = build(config=config, layer_number=1).cuda()
    generator = torch.Generator("cuda").manual_seed(7)
    for name, parameter in sorted(layer.named_parameters()):
        if ".experts." in f".{name}":  # each rank has experts of its own
            generator.manual_seed(1000 * torch.distributed.get_rank() + len(name))
        parameter.data.normal_(0.0, 0.02, generator=generator)
    return layer


def hidden_states(tokens: int) -> torch.Tensor:
    """[tokens, 1, HIDDEN], different on every rank."""
    generator = torch.Generator("cuda").manual_seed(torch.distributed.get_rank())
    return torch.randn(tokens, 1, HIDDEN, generator=generator, device="cuda").bfloat16()


def step(layer: Any, hidden: torch.Tensor, micro_batches: int = 1) -> dict[str, torch.Tensor]:
    """Output and gradients; several micro-batches are all in flight before the first backward."""
    layer.zero_grad(set_to_none=True)
    inputs = [(hidden * (1 + i)).detach().requires_grad_() for i in range(micro_batches)]
    outputs = [layer(x)[0] for x in inputs]
    for y in reversed(outputs):
        y.backward(torch.ones_like(y))
    tensors = {f"output{i}": y.detach() for i, y in enumerate(outputs)}
    tensors |= {f"grad_x{i}": x.grad for i, x in enumerate(inputs)}
    return tensors | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


SHARED = {"moe_shared_expert_intermediate_size": FFN}
SELECTIVE = {"recompute_granularity": "selective"}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "three micro-batches in flight": {"micro_batches": 3},
    "uneven, one rank without a token": {"uneven": True},
    "capacity factor": {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"},
    "router in fp64": {"moe_router_dtype": "fp64"},
    "shared experts": SHARED,
    "shared experts, overlapped": {**SHARED, "moe_shared_expert_overlap": True},
    "whole layer recomputed": {**SELECTIVE, "recompute_modules": ["moe"]},
    "activation recomputed": {**SELECTIVE, "recompute_modules": ["moe_act"]},
    "sequential experts": {"moe_grouped_gemm": False},
}


def compare_features(group: Any) -> dict[str, dict[str, float]]:
    """Feature -> tensor -> relative L2 of the expanded layout against alltoall."""
    errors = {}
    with megatron(group):
        for name, feature in FEATURES.items():
            more = dict(feature)
            micro_batches, uneven = more.pop("micro_batches", 1), more.pop("uneven", False)
            tokens = 512 if not uneven else 0 if group.rank() == 1 else 100 + group.rank()
            hidden = hidden_states(tokens)
            theirs = step(make_layer("alltoall", **more), hidden, micro_batches)
            layer = make_layer("flex", **more)
            ours = step(layer, hidden, micro_batches)
            assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
            errors[name] = {
                key: float((ours[key].double() - theirs[key].double()).norm() / theirs[key].double().norm().clamp(1e-9))
                for key in ours
            }
            layer.eval()
            with torch.no_grad():
                y = layer(hidden)[0]
            errors[name]["eval"] = float((y.double() - ours["output0"].double()).norm() / y.norm().clamp(1e-9))
            megatron_ep_v2.destroy_buffers()
    return errors


def test_every_feature_agrees_with_alltoall() -> None:
    for rank, errors in enumerate(run_ranks(RANKS, compare_features, backend="nccl", timeout=300)):
        for feature, by_tensor in errors.items():
            for name, error in by_tensor.items():
                # bf16 rounds weighted rows, partial sums and sums, each by at most 2**-9
                assert error < 1.5e-2, f"rank {rank}, {feature}, {name}: relative L2 {error:.1e}"


def trace(group: Any) -> dict[str, dict[str, Any]]:
    """Layout -> kernels by name, waits by name, dispatches that wait for counts, peak MiB; one forward + backward."""
    found = {}
    with megatron(group):
        hidden = hidden_states(TOKENS)
        for layout in ("compact", "expanded"):
            layer = make_layer("flex", layout)
            for _ in range(3):
                step(layer, hidden)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(layer, hidden)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                step(layer, hidden)
                torch.cuda.synchronize()
            events = profiler.events()
            on_gpu = Counter(e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
            waits = Counter(e.name for e in events if e.name in WAITS)
            # The last one is ours, above. deep_ep's own wait spins on host memory and is in no trace: one for each
            # dispatch without a handle, told by its kernel's "not cached" form.
            waits["cudaDeviceSynchronize"] -= 1
            found[layout] = {"kernels": dict(on_gpu), "waits": +waits, "peak_mib": peak / 2**20}
        megatron_ep_v2.destroy_buffers()
    return found


def test_nothing_is_permuted_and_the_host_waits_once() -> None:
    by_rank = run_ranks(RANKS, trace, backend="nccl", timeout=300)
    for found in by_rank:
        compact, expanded = found["compact"], found["expanded"]
        deep_ep = {name: n for name, n in expanded["kernels"].items() if "deep_ep::elastic" in name}
        assert sum(n for name, n in deep_ep.items() if "dispatch_impl" in name) == 2
        assert sum(n for name, n in deep_ep.items() if "combine_impl" in name) == 2
        assert any("permute" in name for name in compact["kernels"]), "the trace would not show a permute"
        assert not [name for name in expanded["kernels"] if "permute" in name]
        assert not expanded["waits"], f"besides the dispatch's own wait: {expanded['waits']}"
        assert expanded["peak_mib"] <= compact["peak_mib"]
    print({layout: (found["peak_mib"], dict(found["waits"])) for layout, found in by_rank[0].items()})
    for name, count in sorted(by_rank[0]["expanded"]["kernels"].items()):
        print(f"{count:4d}  {name[:110]}")
