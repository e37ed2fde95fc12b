"""Weight gradients that a module's GEMM adds to `main_grad` by itself, as in Megatron's training, in the example."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers
from qwen3_moe.options import Options
from qwen3_moe.presets import PRESETS

from megatron_ep_v2.megatron.qwen3_moe import model, optimizer
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer
from tests.helpers.compare import relative_error, worst
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import installed
from tests.helpers.shapes import Split

RANKS = 2
SHAPE = dataclasses.replace(PRESETS["tiny"].shape, num_layers=2, hidden_size=64, kv_channels=16, seq_length=32)
RECIPE = dataclasses.replace(PRESETS["tiny"].recipe, global_batch_size=4, micro_batch_size=1)


class Extension:
    """What apex's fused_weight_gradient_mlp_cuda does."""

    def __init__(self) -> None:
        self.calls = 0

    def wgrad_gemm_accum_fp32(self, rows: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
        self.calls += 1
        main_grad.add_(grad.t() @ rows)


def gradients(group: Any, experts: str) -> tuple[dict[str, torch.Tensor], Trainer]:
    trainer = Trainer(Options(shape=SHAPE, recipe=RECIPE, dtype="fp32", experts=experts), torch.device("cpu"))
    generator = torch.Generator().manual_seed(group.rank())
    batches = torch.randint(SHAPE.vocab_size, (2, 1, SHAPE.seq_length + 1), generator=generator)
    for _ in range(2):  # the second says that the first has left nothing
        trainer.backward(list(batches))
    return {name: gradient.clone() for name, gradient in trainer.named_gradients().items()}, trainer


def fused_and_not(group: Any, experts: str) -> tuple[dict[str, float], int, list[bool]]:
    """Distance of each parameter's gradient, calls of the extension, and which linears are fused: the first layer's
    attention, the output layer."""
    with installed(Split(1, RANKS)), pytest.MonkeyPatch.context() as patch:
        wanted, _ = gradients(group, experts)
        extension, plain = Extension(), model.megatron_layer_spec
        patch.setattr(layers, "_grad_accum_fusion_available", True)
        patch.setattr(layers, "fused_weight_gradient_mlp_cuda", extension, raising=False)
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))  # of the gradient that is not read

        def fused(*arguments: Any) -> Any:
            spec = plain(*arguments)
            spec.module = model.with_fused_gradients(spec.module)
            return spec

        patch.setattr(model, "megatron_layer_spec", fused)
        found, trainer = gradients(group, experts)
    linears = trainer.model.decoder.layers[0].self_attention.linear_qkv, trainer.model.output_layer
    distances = {name: relative_error(found[name], gradient) for name, gradient in wanted.items()}
    return distances, extension.calls, [linear.gradient_accumulation_fusion for linear in linears]


@pytest.mark.parametrize("experts", ["megatron", "grouped"])
def test_gradients_are_the_same_where_the_gemm_adds_them(experts: str) -> None:
    """Over two micro-batches, with other parameters whose gradients come from autograd."""
    by_extension = 2 + (2 * SHAPE.num_experts // RANKS if experts == "megatron" else 0)  # linears of a layer
    for distances, calls, fused in run_ranks(RANKS, fused_and_not, experts):
        assert calls == 2 * 2 * SHAPE.num_layers * by_extension
        assert fused == [True, False]
        assert worst(distances.values()) < 1e-6, distances


def test_the_norm_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.nn.Parameter(torch.zeros(5, 20))
    gradients = optimizer.FlatGradients({"weight": parameter}, torch.device("cpu"))
    (parameter * torch.arange(100.0).view(5, 20)).sum().backward()
    for piece in (optimizer._PIECE, 7):
        monkeypatch.setattr(optimizer, "_PIECE", piece)
        assert gradients.square_sum().item() == pytest.approx(sum(i * i for i in range(100)), rel=1e-14)


def test_clipping_in_the_update_is_clipping_before_it() -> None:
    """Against torch's own clipping and AdamW, in fp64."""
    gradients_of_steps = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[3.0], [0.1], [2.0]]
    )
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 40).view(8, 5))
    wanted = torch.nn.Parameter(weight.detach().double())
    theirs = torch.optim.AdamW([wanted], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    gradients = optimizer.Gradients({"weight": weight}, torch.device("cpu"))
    recipe = dataclasses.replace(RECIPE, grad_clip=1.5)
    ours = optimizer.Optimizer({"weight": weight}, gradients, recipe)
    for gradient in gradients_of_steps:
        gradients.dense.buffer.copy_(gradient)
        ours.step(1e-2, gradient.norm().item())
        wanted.grad = gradient.double().view_as(wanted)
        torch.nn.utils.clip_grad_norm_([wanted], 1.5)
        theirs.step()
        torch.testing.assert_close(gradients.by_name["weight"].double(), wanted.grad, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(weight.detach().double(), wanted.detach(), rtol=1e-6, atol=1e-6)


def test_gradients_that_are_replaced_are_those_that_are_zeroed_first() -> None:
    """Over two micro-batches, the second of which alone reaches `late`; `never` is reached in the first step alone."""
    found = []
    for replaced in (False, True):
        parameters = {name: torch.nn.Parameter(torch.ones(3)) for name in ("always", "late", "never")}
        gradients = optimizer.FlatGradients(parameters, torch.device("cpu"))
        gradients.replaced = replaced
        for step in range(2):
            gradients.zero()
            for n, names in enumerate((("always",), ("always", "late"))):
                used = [parameters[name] for name in (*names, *(("never",) if step == 0 else ()))]
                torch.stack(used).mul(step + n + 1).sum().backward()
            gradients.complete()
        found.append({name: gradient.tolist() for name, gradient in gradients.by_name.items()})
    assert found[0] == found[1] == {"always": [5.0] * 3, "late": [3.0] * 3, "never": [0.0] * 3}
