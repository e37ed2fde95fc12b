"""`python -m megatron_ep_v2 bench`, and what it rests on: the closed form, the wire's bytes, the noise rule."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.bench.layer import OurBuffer
from megatron_ep_v2.bench.shapes import (
    PRESETS,
    ROUTINGS,
    Shape,
    even_scores,
    make_batch,
    most_overload,
    overloaded,
    pairs_sent,
    rank_load,
    wire_pairs,
)
from megatron_ep_v2.bench.timing import summarise
from megatron_ep_v2.bench.variants import VARIANTS
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.fused_a2a import get_buffer
from tests.helpers.commands import python
from tests.helpers.compare import worst
from tests.helpers.harness import HANG, run_ranks
from tests.helpers.paths import ROOT
from tests.helpers.stacks import on_one_stack

SMALL = ["--shapes", "custom", "--hidden", "64", "--experts", "8", "--topk", "3", "--tokens", "64", "--repeats", "4"]
ON_CPU = {"alltoall", "allgather", "reference-compact", "reference-expanded", "raw-reference-compact"}
ON_CPU |= {"raw-reference-expanded"}


def bench(*arguments: str, ranks: int = 0, first: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """ranks: started as torchrun starts them."""
    return python("-m", "megatron_ep_v2", "bench", *arguments, ranks=ranks, first=first)


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_table_under_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = bench(*SMALL, "--routing", "balanced", "one-hot-expert", "--out", str(out), ranks=2)
    assert done.returncode == 0, done.stderr
    answer = document(done)
    assert answer["environment"]["megatron_core"] and answer["environment"]["commit"]
    assert answer["environment"]["command"].startswith("torchrun --nproc-per-node 2 -m megatron_ep_v2 bench")
    rows = answer["rows"]
    assert [json.loads(line) for line in out.read_text().splitlines()] == [answer["environment"], *rows]

    by_routing = {name: [row for row in rows if row["routing"] == name] for name in ("balanced", "one-hot-expert")}
    for table in by_routing.values():
        without_step = {variant.name for variant in VARIANTS.values() if not variant.sync_free}
        assert {row["variant"] for row in table} == without_step  # nothing else is left out silently
        assert {row["variant"] for row in table if row["status"] == "ok"} == ON_CPU
        for row in table:
            if row["status"] == "ok":
                assert row["forward_us"] > 0 and 0 < row["forward_backward_p20_us"] <= row["forward_backward_p80_us"]
                assert worst(row["relative_l2"].values()) < 1e-5
                assert row["ranks"] == 2 and row["wire_bytes"] > 0 and row["link_gb_per_s"] > 0
            else:
                assert row["status"] == "unavailable" and row["reason"] and "forward_backward_us" not in row
    assert all(row["busiest_expert_load"] == pytest.approx(8 / 3, rel=1e-3) for row in by_routing["one-hot-expert"])
    for name in ON_CPU:
        assert any(line.startswith(name) for line in done.stdout.splitlines())
    assert "hybridep: not available: " in done.stdout and "raw-expanded: not available: " in done.stdout
    assert "[2/2 custom one-hot-expert 64] round 4/4, about " in done.stderr


@pytest.mark.slow
@on_one_stack
def test_ranks_that_it_starts() -> None:
    """In interpreters of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MCORE_DEEPEP_V2_")}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "megatron_ep_v2", "bench", *SMALL, "--ranks", "2"]
    command += ["--variants", "alltoall", "reference-expanded", "--dtype", "bf16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr
    answer = document(done)
    assert [row["variant"] for row in answer["rows"]] == ["alltoall", "reference-expanded"]
    assert all(row["status"] == "ok" and row["ranks"] == 2 and row["dtype"] == "bf16" for row in answer["rows"])
    assert answer["environment"]["command"].startswith("python -m megatron_ep_v2 bench --shapes custom")


def lose_a_gradient() -> None:
    """On the second rank: of one token's probability; everything else, the output too, is right."""
    if os.environ["RANK"] != "1":
        return
    from megatron_ep_v2 import fused_a2a

    theirs = fused_a2a.FusedDispatch.backward

    def broken(ctx: Any, *gradients: Any) -> Any:
        answer = list(theirs(ctx, *gradients))
        answer[2][0] = 0
        return tuple(answer)

    fused_a2a.FusedDispatch.backward = staticmethod(broken)


@pytest.mark.slow
def test_a_wrong_result_gets_no_time() -> None:
    done = bench(*SMALL, "--variants", "alltoall", "reference-expanded", ranks=2, first=lose_a_gradient)
    assert done.returncode == 1, done.stderr
    rows = {row["variant"]: row for row in document(done)["rows"]}
    assert rows["alltoall"]["status"] == "ok"
    wrong = rows["reference-expanded"]
    assert wrong["status"] == "wrong" and not [name for name in wrong if name.endswith("_us")]
    assert "WRONG RESULT (relative L2: gradient of probabilities" in wrong["reason"]
    assert "output" not in wrong["reason"]
    assert document(done)["summary"]["wrong"] == [
        f"custom, balanced routing, 64 tokens, reference-expanded: {wrong['reason']}"
    ]
    assert "reference-expanded: WRONG RESULT" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "custom"], "add --hidden, --experts and --topk"),
        (["--shapes", "custom", "--hidden", "64", "--experts", "9", "--topk", "3"], "9 experts, top-3"),
        (["--experts-per-rank", "4", "--ranks", "2", "--overload", "1.5", "2.5"], "at most 1 with top-8 of 8 experts"),
        (["--overload", "0.9"], "must be at least 1"),
        (["--overload", "nan"], "must be at least 1"),
        (["--layout", "sync-free"], "no variant of this package has such a layout here"),
        (["--variants", "reference-expanded", "--layout", "compact"], "found: --layout compact"),
        (["--step", "--variants", "sync-free", "--expert-backends", "megatron"], "needed: grouped or deepgemm"),
        (["--overload", "2", "--routing", "zipf"], "takes no --routing"),
        (["--overload", "2", "--tune"], "takes no --overload"),
        (["--redundant-experts", "1"], "needs whole training steps"),
        (["--step", "--tune", "--redundant-experts", "1"], "needs whole training steps"),
        (["--step", "--redundant-experts", "1", "--variants", "alltoall"], "nothing here takes replica slots"),
        (["--step", "--redundant-experts", "1", "--expert-backends", "megatron"], "experts megatron"),
        (["--step", "--redundant-experts", "1", "--sms", "8,16"], "takes one number of --sms"),
        (["--step", "--balance-min-rows", "1"], "is for --redundant-experts"),
        (["--step", "--hot-experts", "1"], "--step with --overload"),
        (["--step", "--overload", "1.5", "--hot-experts", "1", "--ranks", "2"], "on one rank, 1 of its experts"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_and_its_bytes_against_a_count_by_hand(routing: str) -> None:
    ranks, shape, tokens = 4, Shape("small", 32, 12, 3, 1), 50
    batches = [make_batch(shape, tokens, routing, torch.float32, rank, torch.device("cpu")) for rank in range(ranks)]
    sent, per_expert = torch.zeros(ranks, ranks, dtype=torch.int64), torch.zeros(shape.experts, dtype=torch.int64)
    moved = [0] * ranks  # rows that leave each rank, in all four transfers
    for source, batch in enumerate(batches):
        assert torch.equal(batch.routing_map, batch.probs > 0)
        assert all(len(set(topk_idx)) == shape.topk for topk_idx in batch.topk_idx.tolist())
        for token, topk_idx in enumerate(batch.topk_idx.tolist()):
            assert batch.routing_map[token].nonzero().flatten().tolist() == sorted(topk_idx)
            for expert in topk_idx:
                per_expert[expert] += 1
            for target in {expert // (shape.experts // ranks) for expert in topk_idx}:
                sent[source, target] += 1
                if target != source:
                    moved[source] += 2  # dispatch, and the combine's backward
                    moved[target] += 2  # combine, and the dispatch's backward
    assert torch.equal(sent, torch.stack([pairs_sent(batch.topk_idx, shape.experts, ranks) for batch in batches]))
    assert wire_pairs(sent) == max(moved)
    of_rank = [int(per_expert[i : i + 3].sum()) for i in range(0, 12, 3)]
    assert rank_load(per_expert, ranks) == pytest.approx(max(of_rank) / (sum(of_rank) / ranks))
    if routing == "one-hot-expert":
        assert per_expert[0] == ranks * tokens


@pytest.mark.parametrize(("overload", "topk"), [(1.0, 3), (1.2, 3), (2.0, 3), (4.0, 3), (3.0, 4)])
def test_a_forced_overload_is_met_on_every_rank(overload: float, topk: int) -> None:
    """By the first of four ranks of three experts; the others have the rest evenly. The last two are the most there is:
    all selections, and three of four."""
    ranks, shape, tokens, cpu = 4, Shape("small", 32, 12, topk, 1), 400, torch.device("cpu")
    assert overload <= most_overload(shape, ranks) == (4.0 if topk == 3 else 3.0)
    for rank in range(ranks):
        batch = make_batch(shape, tokens, "balanced", torch.float32, rank, cpu, overload=(overload, ranks))
        assert batch.routing_map.sum(dim=1).eq(topk).all() and torch.equal(batch.routing_map, batch.probs > 0)
        received = torch.bincount(batch.topk_idx.flatten() // 3, minlength=ranks).tolist()
        assert received[0] == round(overload * tokens * topk / ranks)
        rest = (tokens * topk - received[0]) / 3
        assert all(abs(other - rest) < 5 * (rest**0.5) + 1 for other in received[1:])


def test_a_forced_overload_of_few_experts() -> None:
    """By two of the first rank's four; its others are selected as those of other ranks are."""
    ranks, topk, tokens, experts = 4, 3, 4000, 16
    shape = Shape("small", 32, experts, topk, 1)
    assert most_overload(shape, ranks, 2) == pytest.approx(4 * (2 + 2 / 14) / 3)
    assert most_overload(shape, ranks, 4) == most_overload(shape, ranks) == 4.0
    scores = even_scores(tokens, experts, torch.Generator().manual_seed(0))
    chosen = overloaded(scores, topk, 1.8, ranks, 2).topk(topk, dim=1, largest=False).indices
    counts = torch.bincount(chosen.flatten(), minlength=experts).double()
    assert counts[:4].sum() == round(1.8 * tokens * topk / ranks)
    assert counts[:2].min() > 3 * counts[2:4].max()
    others = counts[2:].mean()
    assert float((counts[2:] - others).abs().max()) < 5 * float(others) ** 0.5


@pytest.mark.slow
def test_tables_of_a_forced_overload() -> None:
    done = bench(*SMALL, "--overload", "1.0", "1.5", "--variants", "alltoall", "reference-expanded", ranks=2)
    assert done.returncode == 0, done.stderr
    rows = document(done)["rows"]
    assert [(row["overload"], row["variant"]) for row in rows] == [
        (overload, variant) for overload in (1.0, 1.5) for variant in ("alltoall", "reference-expanded")
    ]
    for row in rows:
        assert row["status"] == "ok" and row["busiest_rank_load"] == pytest.approx(row["overload"], abs=0.01)
    assert "[2/2 custom balanced overload 1.5 64]" in done.stderr


def test_the_closed_form_against_a_loop_with_autograd() -> None:
    shape = Shape("small", 16, 8, 3, 1)
    batch = make_batch(shape, 20, "zipf", torch.float64, 1, torch.device("cpu"))
    for ranks in (None, 4):
        hidden, probs = batch.hidden.clone().requires_grad_(), batch.probs.double().requires_grad_()
        output, loss = torch.zeros_like(batch.hidden), torch.zeros((), dtype=torch.float64)
        for token, topk_idx in enumerate(batch.topk_idx.tolist()):
            for expert in topk_idx:
                loss = loss + probs[token, expert] ** 2 / 2
            for _ in topk_idx if ranks is None else {expert // (8 // ranks) for expert in topk_idx}:
                output[token] += hidden[token].detach()
                loss = loss + (hidden[token] * batch.grad_output[token]).sum()
        loss.backward()
        expected = batch.expected(ranks)
        torch.testing.assert_close(expected["output"], output)
        torch.testing.assert_close(expected["gradient of hidden states"], hidden.grad)
        torch.testing.assert_close(expected["gradient of probabilities"], probs.grad)


def _sms_of_a_dispatch(group: Any) -> tuple[str, list[int], list[int | None]]:
    """The class that the bench finds in the pool, what the calls of two variants in turn go by, and what their rows
    say afterwards."""
    topk_idx = torch.tensor([[0, 1]])
    first = OurBuffer(VARIANTS["compact"], None, group, 1)  # whose run makes the buffer, with a choice of its own
    first.enter()
    settings.activate(settings.resolve(buffer="reference", num_max_tokens_per_rank=1))
    get_buffer(group, torch.ones(1, 8), topk_idx, 4)
    first.live.num_sms = 14
    first.leave()
    seen = []
    ours = [OurBuffer(VARIANTS["compact"], sms, group, 1) for sms in (24, 32)]  # its way to set them, on what is here
    for variant in (*ours, *ours):
        variant.enter()
        seen.append(getattr(pool.find(group), "buffer", pool.find(group)).num_sms)
        variant.leave()
    name = type(ours[0].live).__name__
    pool.destroy_buffers()
    settings.activate(None)
    return name, seen, [variant.num_sms for variant in (first, *ours)]


def test_an_sm_count_reaches_the_buffer_below_its_watchdog() -> None:
    answers = run_ranks(2, _sms_of_a_dispatch, env={"MCORE_DEEPEP_V2_WATCHDOG_SECS": "30"})
    assert answers == [("ReferenceBuffer", [24, 32, 24, 32], [14, 24, 32])] * 2


def test_batches_differ_between_ranks_and_repeat() -> None:
    shape, cpu = PRESETS["mixtral"], torch.device("cpu")
    first, again, other = (make_batch(shape, 8, "balanced", torch.float32, rank, cpu) for rank in (0, 0, 1))
    assert torch.equal(first.hidden, again.hidden) and torch.equal(first.topk_idx, again.topk_idx)
    assert not torch.equal(first.hidden, other.hidden)


def test_the_noise_rule() -> None:
    generator = random.Random(0)
    steady = [100 + generator.uniform(-4, 4) for _ in range(30)]
    assert summarise(steady).noise == ""
    assert summarise(steady).p20 < summarise(steady).median < summarise(steady).p80
    drift = [value if i < 15 else 1.12 * value for i, value in enumerate(steady)]
    assert summarise(drift).noise.startswith("two halves of the repeats differ by 1")
    two_speeds = [value * factor for value, factor in zip(steady, itertools.cycle((1, 1.15)))]
    assert summarise(two_speeds).noise.startswith("two halves of the repeats differ by 1")
    wide = [value * factor for value, factor in zip(steady, itertools.cycle((1, 1, 0.6, 0.6, 1.5, 1.5, 1, 1)))]
    assert summarise(wide).noise
    assert summarise([100.0, 100.0, 100.0]).noise == "fewer than 4 repeats"
