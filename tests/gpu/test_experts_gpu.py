"""Experts chosen by a setting on GPUs: their weight gradients against fp64, and training against TransformerEngine's
grouped experts in Megatron's DDP and distributed optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ep_v2.experts.gemm import gemm
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import linear
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.kernels import wgrad
from tests.helpers.compare import relative_error, worst
from tests.helpers.expert_rows import SIZES
from tests.helpers.harness import run_ranks
from tests.kernels.test_wgrad import exact

RANKS = gpu_ranks()
STEPS = 4


@pytest.mark.parametrize("sizes", [*SIZES.values(), [300, 0, 1, 77, 512, 0, 128, 5]], ids=str)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [(1536, 2048), (96, 40), (130, 257)], ids=str)
def test_weight_gradients_are_added_in_fp32(sizes: list[int], kind: torch.dtype, columns: tuple[int, int]) -> None:
    """Rows of no expert hold NaN; an expert without rows keeps what was there, bit for bit."""
    generator = torch.Generator("cuda").manual_seed(1)
    grad, x = (torch.randn(sum(sizes) + 9, n, generator=generator, device="cuda").to(kind) for n in columns)
    grad[sum(sizes) :], x[sum(sizes) :] = float("nan"), float("nan")
    ends = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
    for out_kind in {torch.float32 if kind != torch.float64 else kind, kind}:
        before = torch.randn(len(sizes), *columns, generator=generator, device="cuda").to(out_kind)
        out = before.clone()
        wgrad.add_(out, grad, x, ends)
        wanted = exact(before, grad, x, ends)
        for expert, size in enumerate(sizes):
            if not size:
                assert torch.equal(out[expert], before[expert])
                continue
            error = relative_error(out[expert], wanted[expert])
            assert error < {torch.float64: 1e-12, torch.float32: 2e-6}.get(out_kind, 4e-3), error
        replaced = torch.full_like(out, float("nan"))
        wgrad.add_(replaced, grad, x, ends, overwrite=True)
        wanted = exact(torch.zeros_like(before), grad, x, ends)
        assert not replaced[[expert for expert, size in enumerate(sizes) if not size]].any()
        error = relative_error(replaced, wanted) if wanted.any() else 0.0
        assert error < {torch.float64: 1e-12, torch.float32: 2e-6}.get(out_kind, 4e-3), error


def test_what_a_hook_of_another_stream_reads_is_the_whole_gradient() -> None:
    """Megatron-LM builds DDP in a stream of its own, in which DDP's hook then scales and reduces `main_grad`. Here the
    hook copies it, while the stream of the backward is still busy before the gradient's kernel."""
    weight = torch.nn.Parameter(torch.randn(2, 64, 64, device="cuda").bfloat16())
    main_grad, copies = torch.zeros(weight.shape, device="cuda"), list[torch.Tensor]()
    with torch.cuda.stream(torch.cuda.Stream()):
        node = weight.expand_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    node.register_hook(lambda *_: copies.append(main_grad.clone()))
    x = torch.randn(128, 64, device="cuda").bfloat16().requires_grad_()
    groups = Groups.from_counts(torch.tensor([100, 28]), x)
    for _ in range(2):  # the kernel is compiled in the first
        y = linear(x, weight, groups, gemm("sequential"), True, None, main_grad.zero_())
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        y.backward(torch.ones_like(y))
        torch.cuda.synchronize()
    assert main_grad.any() and torch.equal(copies[-1], main_grad)


def train(group: Any, experts: str, fusion: bool, state: dict[str, torch.Tensor] | None) -> Any:
    """Losses, norms and experts' main gradients of the last step; the weights at the start, one by one."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    import megatron_ep_v2
    from tests.helpers.megatron_layer import build_layer, hidden_states
    from tests.helpers.shapes import GPU

    megatron_ep_v2.install(buffer=GPU.buffer, num_max_tokens_per_rank=GPU.tokens, experts=experts)
    layer = build_layer(GPU, "flex", gradient_accumulation_fusion=fusion)
    if state is None:
        state = {name: p.detach().clone() for name, p in layer.named_parameters()}
    else:
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name in state:
                    parameter.copy_(state[name])
                else:  # all experts in one
                    parameter.copy_(torch.stack([state[f"{name}{i}"] for i in range(len(parameter))]))
    ddp = DistributedDataParallel(
        layer.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            grad_reduce_in_fp32=True,
        ),
        layer,
    )
    config = OptimizerConfig(
        optimizer="adam", lr=1e-4, bf16=True, use_distributed_optimizer=True, overlap_param_gather=True, clip_grad=1.0
    )
    optimizer = get_megatron_optimizer(config, [ddp])
    said, hidden = [], hidden_states(GPU, GPU.tokens, 1)
    for _ in range(STEPS):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        for last in (False, True):  # two micro-batches
            ddp.is_last_microbatch = last
            y = ddp(hidden)[0]
            loss = (y.float() - hidden.float()).square().mean()
            loss.backward()
        finalize_model_grads([ddp])
        main = {name: p.main_grad.detach().cpu().clone() for name, p in layer.named_parameters() if "experts." in name}
        _, norm, _ = optimizer.step()
        said.append((loss.item(), float(norm)))
    megatron_ep_v2.uninstall()
    return said, main, state


def against_transformer_engine(group: Any) -> dict[str, Any]:
    from tests.helpers.megatron_layer import process_groups

    found = {}
    with process_groups():
        theirs, main, state = train(group, "megatron", True, None)
        for fusion in (True, False):
            ours, own, _ = train(group, "grouped", fusion, state)
            errors = []
            for name, stacked in own.items():
                wanted = torch.stack([main[f"{name}{i}"] for i in range(len(stacked))])
                errors.append(relative_error(stacked, wanted))
            found[f"fusion={fusion}"] = {
                "loss": worst(abs(a[0] - b[0]) / b[0] for a, b in zip(ours, theirs, strict=True)),
                "norm": worst(abs(a[1] - b[1]) / b[1] for a, b in zip(ours, theirs, strict=True)),
                "main_grad": worst(errors),
            }
    return found


def test_training_against_transformer_engines_grouped_experts() -> None:
    """Real DDP and distributed optimizer, gradients reduced and parameters gathered during compute, in bf16."""
    pytest.importorskip("transformer_engine")
    for found in run_ranks(RANKS, against_transformer_engine, backend="nccl"):
        assert len(found) == 2
        for fusion, errors in found.items():
            print(fusion, errors)
            assert errors["loss"] < 2e-3 and errors["norm"] < 1e-2 and errors["main_grad"] < 3e-2, (fusion, errors)
