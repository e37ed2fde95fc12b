"""Megatron's 1F1B overlap of expert parallelism on the CPU: a small GPT trained by its plan, one micro-batch's forward
next to another's backward, against the same model and micro-batches one after the other.

The plan frees what it takes to be no longer needed. What our autograd functions and experts have saved must not be
among that.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.pipeline_parallel import utils as streams
from megatron.core.transformer.moe.moe_layer import MoELayer
from qwen3_moe.options import Options
from qwen3_moe.presets import PRESETS

from megatron_ep_v2.device_checks import read_all
from megatron_ep_v2.megatron import binding, symbols
from megatron_ep_v2.megatron.qwen3_moe.model import build_model, named_parameters
from megatron_ep_v2.megatron.stacked_linear import StackedLinear
from tests.helpers.compare import relative_error
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import installed
from tests.helpers.one_memory import in_one_memory
from tests.helpers.shapes import Split
from tests.helpers.stream_memory import Stream, streams_on_the_cpu

RANKS, LAYERS, MICRO_BATCHES, TOKENS, VOCABULARY = 2, 2, 3, 32, 64
SHAPE = dataclasses.replace(
    PRESETS["tiny"].shape,
    num_layers=LAYERS,
    hidden_size=64,
    kv_channels=16,
    moe_ffn_hidden_size=32,
    num_experts=8,
    topk=3,
    seq_length=TOKENS,
    vocab_size=VOCABULARY,
)
RECIPE = dataclasses.replace(PRESETS["tiny"].recipe, aux_loss_coeff=0.0)  # Megatron logs it for the whole process


@contextlib.contextmanager
def plan_on_the_cpu() -> Iterator[list[int]]:
    """What Megatron's plan needs of CUDA, on the CPU: one order of execution, so streams and events only count.

    Yields the sizes of the storages that the plan has freed. They keep their memory, full of NaN: whatever still reads
    it shows in the results, and not only where a kernel minds that nothing is there.
    """
    freed: list[int] = []

    def poison(storage: torch.UntypedStorage, size: int) -> None:
        assert size == 0
        freed.append(storage.nbytes())
        storage.fill_(0xFF)  # of every floating type a NaN

    with streams_on_the_cpu() as compute, pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_COMP_STREAM", compute)  # of 0.16; later the current one
        patch.setattr(streams, "_COMM_STREAM", Stream(name="communication"))
        for name in ("range_push", "range_pop"):
            patch.setattr(torch.cuda.nvtx, name, lambda *_: None)
        patch.setattr(torch.UntypedStorage, "resize_", poison)
        yield freed


def micro_batches(rank: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(rank)

    def tokens() -> torch.Tensor:
        return torch.randint(VOCABULARY, (1, TOKENS), generator=generator)

    rest = {"position_ids": torch.arange(TOKENS)[None], "attention_mask": None}
    return [{"input_ids": tokens(), "labels": tokens(), **rest} for _ in range(MICRO_BATCHES)]


def one_after_the_other(model: Any, batches: list[dict[str, Any]], grad: torch.Tensor) -> list[torch.Tensor]:
    """The losses of all tokens; gradients add up in the model, as below."""
    losses = []
    for batch in batches:
        losses.append(model(**batch))
        losses[-1].backward(grad)
    return losses


def planned(model: Any, batches: list[dict[str, Any]], grad: torch.Tensor) -> list[torch.Tensor]:
    run, losses, previous = TransformerModelChunkSchedulePlan.run, [], None
    for batch in batches:
        plan = model.build_schedule_plan(**batch)
        losses.append(run(plan, previous, b_grad=grad if previous else None).detach())
        previous = plan
    run(None, previous, b_grad=grad)
    return losses


def compare(
    group: Any, layout: str, experts: str, keep_rows: bool, order: list[str] | None = None
) -> tuple[dict[str, float], int]:
    """Relative L2 distance of each micro-batch's losses and each parameter's gradient, and how often the plan freed
    something.

    Args:
        keep_rows: False = with the rule by which Megatron itself frees.
        order: The configuration has `overlap_moe_expert_parallel_comm` and `delay_wgrad_compute` while the plan runs;
            emptied before, and weight gradients of this package's experts are noted.
    """
    mode: dict[str, Any] = {"sync_free": True} if layout == "sync-free" else {"layout": layout}
    options = Options(shape=SHAPE, recipe=RECIPE, dtype="fp32", experts=experts)
    batches, grad = micro_batches(group.rank()), torch.full((1, TOKENS), 1 / (MICRO_BATCHES * TOKENS))
    with installed(Split(1, RANKS), num_max_tokens_per_rank=TOKENS, **mode), pytest.MonkeyPatch.context() as patch:
        for module, name, theirs, _ in binding.bound():
            if name == "should_free_input" and not keep_rows:
                patch.setattr(module, name, theirs)
        model = build_model(options, torch.device("cpu"), group.rank(), RANKS)

        def results(losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            read_all()
            named = {f"losses {i}": values.detach() for i, values in enumerate(losses)}
            for name, parameter in named_parameters(model, group.rank(), SHAPE.num_experts // RANKS).items():
                assert parameter.grad is not None, name
                named[name] = parameter.grad
            model.zero_grad(set_to_none=True)
            return named

        wanted = results(one_after_the_other(model, batches, grad))
        if order is not None:
            for module in model.modules():
                if isinstance(module, MoELayer):
                    patch.setattr(module.config, "overlap_moe_expert_parallel_comm", True)
                    patch.setattr(module.config, "delay_wgrad_compute", True)
                if isinstance(module, StackedLinear):
                    module._delays = True
                    module.weight.register_hook(lambda _: order.append("gradient"))
            order.clear()
        with plan_on_the_cpu() as freed:
            found = results(planned(model, batches, grad))
        assert all(tensor.norm() > 0 for tensor in wanted.values())
        return {name: relative_error(found[name], tensor) for name, tensor in wanted.items()}, len(freed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "experts"),
    [
        ("compact", "megatron"),
        ("compact", "grouped"),
        ("expanded", "megatron"),
        ("expanded", "grouped"),
        ("expanded", "sequential"),
        ("sync-free", "grouped"),
    ],
)
def test_losses_and_gradients_are_those_of_one_micro_batch_after_the_other(layout: str, experts: str) -> None:
    """In each layer the plan frees what went into the combine; and what went into the experts, where that was copied
    before they saved it."""
    frees = 2 if layout == "compact" else 1
    for rank, (errors, freed) in enumerate(run_ranks(RANKS, compare, layout, experts, True)):
        for name, error in errors.items():
            assert error < 1e-6, f"rank {rank}, {name}: relative L2 {error:.1e}"
        assert freed == frees * LAYERS * MICRO_BATCHES


@pytest.mark.parametrize(("layout", "experts"), [("expanded", "megatron"), ("sync-free", "grouped")])
def test_megatrons_own_rule_frees_what_the_experts_have_saved(layout: str, experts: str) -> None:
    """The control: a plan that frees too much is noticed, and it is the experts' gradients that it spoils."""
    for errors, freed in run_ranks(RANKS, compare, layout, experts, False):
        assert freed == 2 * LAYERS * MICRO_BATCHES
        spoilt = {name for name, error in errors.items() if not error < 1e-6}
        assert spoilt == {name for name in errors if ".experts." in name and "linear_fc1" in name}


def started(group: Any, experts: str) -> tuple[dict[str, float], list[str]]:
    """Distances as `compare`'s, and what happened in order."""
    node = symbols.find_symbols()[1][symbols.SCHEDULE].TransformerLayerNode
    with in_one_memory() as order, pytest.MonkeyPatch.context() as patch:
        theirs = node.backward_dw

        def noted(self: Any) -> None:
            if self.name == "mlp":
                order.append("weight gradients")
            theirs(self)

        patch.setattr(node, "backward_dw", noted)
        # Of modules without one, as linears are in 0.16 where TransformerEngine is not installed.
        patch.setattr(torch.nn.Module, "backward_dw", lambda _: None, raising=False)
        return compare(group, "expanded", experts, True, order)[0], order


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["megatron", "grouped"])
def test_a_dispatch_is_started_in_its_node_and_its_rows_are_waited_for_later(experts: str) -> None:
    """Next to another micro-batch's backward, the host launches its weight gradients before it waits for the counts."""
    for errors, order in run_ranks(RANKS, started, experts):
        assert all(error < 1e-6 for error in errors.values())
        starts = [i for i, each in enumerate(order) if each == "dispatch starts"]
        assert len(starts) == LAYERS * MICRO_BATCHES
        alone, overlapping = starts[:LAYERS], starts[LAYERS:]
        assert {order[i + 1] for i in alone} == {"dispatch ends"}
        grads = ["gradient"] * 2 if experts == "grouped" else []
        wanted = ["weight gradients", *grads, "dispatch ends"]
        assert all(order[i + 1 : i + 1 + len(wanted)] == wanted for i in overlapping)
        assert order.count("gradient") == len(grads) * LAYERS * MICRO_BATCHES
        assert not any("combine" in each for each in order), "a backward that starts earlier would hold the dispatch up"
