"""How many tokens a rank may dispatch: what Megatron's configuration says of it, and capacities that grow."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import num_microbatches_calculator
from torch.utils.checkpoint import checkpoint

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.errors import PeerError, TokenCapacityError
from megatron_ep_v2.fused_a2a import fused_dispatch
from megatron_ep_v2.recompute import Replayed
from tests.helpers.cases import COMPACT, EXPANDED, Case, Layout
from tests.helpers.compare import assert_close, relative_error
from tests.helpers.fused_layer import assert_step, dense, grad_output, layer_of, train_step
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.megatron_layer import FlexLayer, hidden_states, installed
from tests.helpers.reports import assert_report, attempt, log_records
from tests.helpers.shapes import CPU, Split

CAPACITY = "MCORE_DEEPEP_V2_MAX_TOKENS_PER_RANK"
EP2 = Split(1, 2)
TOKENS = 5  # of the first batch
ARGUMENTS = {
    "seq_length": 16,
    "micro_batch_size": 1,
    "context_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
}
OF_ARGUMENTS = "Megatron's sequence length and micro-batch size"
OF_MODEL = "the model's seq_length and the micro-batch size"
OBSERVED = "the most tokens of any rank at its first dispatch"

# What Megatron-LM was started with; fields of the model's configuration; the micro-batch size given to Megatron's
# calculator; tokens of a later batch; what the buffer says of its capacity then.
WIDE = ARGUMENTS | {"seq_length": 100, "micro_batch_size": 3, "tensor_model_parallel_size": 8}
SOURCES: dict[str, tuple[dict[str, Any] | None, dict[str, Any], int, int, str]] = {
    "all": (WIDE, {}, 0, TOKENS, f"300 ({OF_ARGUMENTS})"),
    "context parallel": (WIDE | {"context_parallel_size": 2}, {}, 0, TOKENS, f"150 ({OF_ARGUMENTS})"),
    # Of one rank: the sequence is shared out, rounded up.
    "sequence parallel": (
        WIDE | {"context_parallel_size": 2, "sequence_parallel": True},
        {},
        0,
        TOKENS,
        f"{3 * 7} ({OF_ARGUMENTS})",
    ),
    "no length": ({"seq_length": None}, {}, 0, TOKENS, f"{TOKENS} ({OBSERVED})"),
    "evaluation": (ARGUMENTS | {"eval_micro_batch_size": 4}, {}, 0, 64, f"64 ({OF_ARGUMENTS})"),
    "training": (ARGUMENTS | {"micro_batch_size": 4, "eval_micro_batch_size": 2}, {}, 0, 64, f"64 ({OF_ARGUMENTS})"),
    "decoder": (ARGUMENTS | {"decoder_seq_length": 24}, {}, 0, 24, f"24 ({OF_ARGUMENTS})"),
    "hybrid context parallel": (
        ARGUMENTS | {"context_parallel_size": 2, "hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 12},
        {},
        0,
        12,
        f"12 ({OF_ARGUMENTS})",
    ),
    "any length": (
        ARGUMENTS | {"variable_seq_lengths": True},
        {},
        0,
        40,
        f"48 (grown for a later batch; before, 16: {OF_ARGUMENTS})",
    ),
    "another framework": (None, {"seq_length": 10}, 3, 30, f"30 ({OF_MODEL})"),
    "another framework, context parallel": (
        None,
        {"seq_length": 10, "context_parallel_size": 2},
        3,
        15,
        f"15 ({OF_MODEL})",
    ),
    # Then seq_length is what the positions allow, and would make a buffer that is far too large.
    "another framework, any length": (
        None,
        {"seq_length": 100_000, "variable_seq_lengths": True},
        3,
        TOKENS,
        f"{TOKENS} ({OBSERVED})",
    ),
    "no calculator": (None, {"seq_length": 100_000}, 0, TOKENS, f"{TOKENS} ({OBSERVED})"),
}


def run_source(group: Any, name: str) -> tuple[str, float]:
    """What the buffer says after a batch of `TOKENS` and a later one without gradients; the later one's error."""
    arguments, fields, micro_batch_size, tokens, _ = SOURCES[name]
    module: Any = ModuleType("megatron.training.global_vars")
    module._GLOBAL_ARGS = SimpleNamespace(**arguments) if arguments else None
    calculator = SimpleNamespace(micro_batch_size=micro_batch_size) if micro_batch_size else None
    with pytest.MonkeyPatch.context() as monkeypatch, installed(EP2):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(num_microbatches_calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", calculator)
        layer = FlexLayer(CPU, EP2, moe_aux_loss_coeff=0.0)
        vars(layer.config).update(fields)
        layer(hidden_states(CPU, TOKENS))
        hidden = hidden_states(CPU, tokens if group.rank() else 1)
        with torch.no_grad():
            error = relative_error(layer(hidden), layer.dense(hidden))
        return megatron_ep_v2.status()["buffers"][0]["num_max_tokens_per_rank"], error


def run_sources(group: Any) -> dict[str, tuple[str, float]]:
    return {name: run_source(group, name) for name in SOURCES}


@pytest.mark.slow
def test_the_configuration_says_how_many_tokens_a_rank_may_have() -> None:
    for answers in run_ranks(2, run_sources):
        for name, (said, error) in answers.items():
            assert said == SOURCES[name][-1], name
            assert error < 5e-6, name


# ------------------------------------------------------------------------------------------------ a capacity that grows

FIRST = Case("first", tokens=(5, 6), experts=8, dtype=torch.float64)
LATER = Case("later", tokens=(4, 17), experts=8, dtype=torch.float64, seed=2)
LARGEST = Case("largest", tokens=(25, 2), experts=8, dtype=torch.float64, seed=3)


def dispatch(group: Any, tokens: int, **more: Any) -> Any:
    """A dispatch without gradients; its handle."""
    topk_idx = torch.tensor([[0, 3, 7]]).expand(tokens, -1).contiguous()
    x, probs = torch.randn(tokens, 32, dtype=torch.float64), torch.rand(tokens, 3)
    with torch.no_grad():
        return fused_dispatch(x, topk_idx, probs, 8, group, **more)[-1]


@isolated
def grow(group: Any, layout: Layout) -> dict[str, Any]:
    """Forwards of two layers are pending, one of them in a checkpoint, when first rank 1 and then rank 0 has a larger
    batch. The handle of a third is all that is left of it, on rank 1."""
    settings.activate(settings.resolve(buffer="reference"))
    rank = group.rank()
    pending, replayed = layer_of(group, FIRST, layout), layer_of(group, FIRST, layout)
    output = pending[0](*pending[1:])
    recomputed = checkpoint(Replayed(replayed[0]), *replayed[1:], use_reentrant=True)
    kept = [dispatch(group, 2)] if rank else dispatch(group, 2) and []
    growing: Any = pool.find(group)
    made, capacities, later = [growing.buffer], [growing.num_max_tokens_per_rank], []
    with log_records() as records:
        for case in (LATER, LARGEST, FIRST):
            later.append((case, train_step(case, layout, group)))
            made.append(growing.buffer)
            capacities.append(growing.num_max_tokens_per_rank)
    earlier, asked = [], []
    combine = made[0].combine
    made[0].combine = lambda *args, **named: asked.append(len(made)) or combine(*args, **named)
    for (_, x, probs), y in ((pending, output), (replayed, recomputed)):
        y.backward(grad_output(FIRST, rank))
        earlier.append((y.detach(), x.grad, probs.grad))
    destroyed = []
    for _ in range(2):
        later.append((FIRST, train_step(FIRST, layout, group)))
        destroyed.append([buffer._destroyed for buffer in made[:3]])
        kept.clear()
    refused = attempt(lambda: dispatch(group, 40 if rank else 4, do_cpu_sync=False))
    said = pool.describe(growing, settings.active())["num_max_tokens_per_rank"]
    pool.destroy_buffers()
    return {
        "later": later,
        "earlier": earlier,
        "asked": len(asked),
        "capacities": capacities,
        "destroyed": [*destroyed, [buffer._destroyed for buffer in made[:3]]],
        "refused": refused,
        "said": said,
        "lines": [line for line in (record.getMessage() for record in records) if "grows from" in line],
    }


@pytest.mark.parametrize("layout", [COMPACT, EXPANDED], ids=str)
def test_a_larger_batch_makes_the_capacity_grow(layout: Layout) -> None:
    for rank, found in enumerate(run_ranks(2, grow, layout)):
        for case, step in found["later"]:
            assert_step(case, rank, step)
        expected = dense(FIRST)
        for output, grad_x, grad_probs in found["earlier"]:
            for name, actual, wanted in (
                ("output", output, expected.output),
                ("gradient of x", grad_x, expected.grad_x),
                ("gradient of the probabilities", grad_probs, expected.grad_probs),
            ):
                assert_close(f"{name} of a forward before", actual, wanted[rank], 1e-13)
        assert found["asked"] == 3, "two backwards of a dispatch, and a combine that is recomputed"
        assert found["capacities"] == [6, 24, 32, 32]
        # Rank 1 still has a handle of the first buffer; then no rank has one of an old buffer; then all are gone.
        assert found["destroyed"] == [[False, False, False], [True, True, False], [True, True, True]]
        assert found["said"].startswith("32 (grown for a later batch; before, 6")
        assert [f"{CAPACITY}={capacity} " in text for capacity, text in zip((24, 32), found["lines"], strict=True)]
        if rank:
            assert_report(found["refused"], TokenCapacityError, "rank 1 has 40 tokens", "=32", f"{CAPACITY}=40")
        else:
            assert_report(found["refused"], PeerError, "rank 1")


@isolated
def start_groups(group: Any) -> list[tuple[list[tuple[int, str]], int]]:
    """What is logged at the first dispatch of a group, and its capacity after a larger batch: unset, again, sync-free,
    set."""
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for chosen in ({}, {}, {"sync_free": True}, {"num_max_tokens_per_rank": 9}):
            settings.activate(settings.resolve(buffer="reference", **chosen))
            if len(found) != 1:  # of which the one before has warned
                monkeypatch.setattr("megatron_ep_v2.buffers.capacity._warned", False)
            with log_records() as records:
                dispatch(group, 4)
            dispatch(group, 9 if group.rank() and "sync_free" not in chosen else 4)
            lines = [(record.levelno, record.getMessage()) for record in records]
            found.append(([line for line in lines if CAPACITY in line[1]], pool.buffers()[0].num_max_tokens_per_rank))
            pool.destroy_buffers()
    return found


def test_a_capacity_that_was_only_observed_is_announced_with_its_price() -> None:
    for unset, again, sync_free, chosen in run_ranks(2, start_groups):
        [(level, text)], capacity = unset
        assert level == logging.WARNING and f"num_max_tokens_per_rank=4 is {OBSERVED}" in text and capacity == 12
        assert "all ranks build a larger buffer" in text and "all-reduce" in text
        assert again == ([], 12), "once is enough"
        [(level, text)], capacity = sync_free
        assert "raises" in text and "all-reduce" not in text and capacity == 4
        assert chosen == ([], 9)


def test_capacities_are_few_and_at_most_half_as_large_again() -> None:
    from megatron_ep_v2.buffers.growing import round_up

    rounded = {tokens: round_up(tokens) for tokens in range(1, 10_000)}
    assert all(tokens <= capacity < 1.5 * tokens + 1 for tokens, capacity in rounded.items())
    assert len(set(rounded.values())) < 30


@isolated
def state_too_little(group: Any) -> tuple[Any, int]:
    """Rank 1 has more tokens than the capacity that was stated: what is said, and how many buffers were built."""
    settings.activate(settings.resolve(buffer="reference", num_max_tokens_per_rank=4))
    return attempt(lambda: dispatch(group, 5 if group.rank() else 3)), len(pool.buffers())


def test_a_stated_capacity_below_a_first_batch_is_refused_before_a_buffer_is_built() -> None:
    """On all ranks: a carrier whose ranks do not learn of a refusal would leave the others in its dispatch."""
    (other, others_buffers), (own, own_buffers) = run_ranks(2, state_too_little)
    assert_report(own, TokenCapacityError, "5 tokens", "more than the setting", f"set {CAPACITY}=5")
    assert_report(other, PeerError, "rank 1 refused")
    assert others_buffers == own_buffers == 0
