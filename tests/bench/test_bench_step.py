"""`python -m megatron_ep_v2 bench --step --tune`, and what it rests on: the work of a step, the shares, the advice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ep_v2.bench.step.advice import advice, what_bounds, what_experts_give
from megatron_ep_v2.bench.step.forced import _forced
from megatron_ep_v2.bench.step.model import layers_that_fit, step_flops
from megatron_ep_v2.bench.step.replicas import CALLS, what_replicas_give
from megatron_ep_v2.bench.step.sections import Stopwatch, Watched
from megatron_ep_v2.cli.bench_options import parse
from megatron_ep_v2.megatron.qwen3_moe.expert_kinds import owner
from megatron_ep_v2.megatron.qwen3_moe.options import SHAPES
from tests.bench.test_bench import bench, document
from tests.helpers.compare import worst

SMALL = ["--shapes", "custom", "--hidden", "128", "--topk", "3", "--expert-ffn", "64"]
SMALL += ["--tokens", "48", "--layers", "2", "--repeats", "4", "--micro-batches", "2"]


@pytest.mark.slow
def test_whole_steps_of_every_dispatcher_here_end_with_settings_to_copy(tmp_path: Path) -> None:
    done = bench(*SMALL, "--experts", "8", "--step", "--tune", "--out", str(tmp_path / "rows.jsonl"), ranks=2)
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in document(done)["rows"]}
    timed = {name: row for name, row in rows.items() if row["status"] == "ok"}
    assert set(timed) == {"alltoall", "allgather", "reference-compact", "reference-expanded"}
    assert "hybridep" in rows and not any(name.startswith("raw") for name in rows)
    for row in timed.values():
        assert worst(row["relative_l2"].values()) < 1e-5  # loss and gradient norm, against the first dispatcher's
        seconds = row["step_ms"] / 1e3
        assert row["tokens_per_second"] == pytest.approx(2 * 2 * 48 / seconds, rel=1e-2)
        assert row["tflops_per_rank"] > 0
        assert row["dispatch_percent"] > 0 and row["combine_percent"] > 0
        assert row["dispatch_percent"] + row["combine_percent"] < 100
    assert timed["alltoall"]["ratio_to_alltoall"] == 1
    best = min((row for row in timed.values() if row["layout"]), key=lambda row: row["step_ms"])
    assert f"best: {best['variant']}, {best['step_ms']:.2f} ms a step" in done.stdout
    assert f"export MCORE_DEEPEP_V2_LAYOUT={best['layout']}" in done.stdout
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1 + len(rows)


@pytest.mark.slow
def test_whole_steps_with_every_kind_of_experts() -> None:
    """On one set of weights: all of them train the same. What cannot run here says why, once for all dispatchers."""
    kinds = ["megatron", "grouped", "sequential", "deepgemm", "megatron-opfuser"]
    variants = ["alltoall", "reference-expanded", "hybridep", "reference-sync-free"]
    done = bench(
        *(*SMALL, "--experts-per-rank", "4", "--step", "--no-optimizer"),
        *("--variants", *variants, "--expert-backends", *kinds),
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    rows = {(row["variant"], row["expert_backend"]): row for row in document(done)["rows"]}
    without_a_wait = {("reference-sync-free", kind) for kind in ("grouped", "deepgemm")}
    assert set(rows) == {(variant, kind) for variant in variants[:3] for kind in kinds} | without_a_wait
    timed = {names for names, row in rows.items() if row["status"] == "ok"}
    ours = {("reference-sync-free", "grouped")}
    assert timed == {(variant, kind) for variant in variants[:2] for kind in kinds[:3]} | ours
    for names, row in rows.items():
        assert row["experts"] == 8 and row["optimizer"] is False
        if names in timed:
            assert worst(row["relative_l2"].values()) < 1e-5
            fastest = rows["alltoall", "megatron"]["step_ms"]  # of alltoall's with Megatron's experts, the only one
            assert row["ratio_to_alltoall"] == pytest.approx(row["step_ms"] / fastest, abs=1e-3)
        else:
            assert row["status"] == "unavailable" and "step_ms" not in row
    assert "No module named 'deep_gemm'" in rows["alltoall", "deepgemm"]["reason"]
    assert "SequentialMLP" in rows["alltoall", "megatron-opfuser"]["reason"]
    lines = done.stdout.splitlines()
    missing = [line.partition(":")[0] for line in lines if ": not available: " in line]
    assert sorted(missing) == ["deepgemm experts", "hybridep", "megatron-opfuser experts"]
    assert [line.split()[0] for line in lines if "the tokens/s" in line] == ["grouped", "sequential"]


@pytest.mark.slow
def test_whole_steps_with_a_forced_overload() -> None:
    """In each layer and micro-batch, with both dispatchers; the busiest expert follows from it."""
    done = bench(
        *(*SMALL, "--experts", "8", "--step", "--overload", "1.0", "1.5"),
        *("--variants", "alltoall", "reference-expanded", "--expert-backends", "megatron"),
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    rows = document(done)["rows"]
    assert [(row["overload"], row["variant"]) for row in rows] == [
        (overload, variant) for overload in (1.0, 1.5) for variant in ("alltoall", "reference-expanded")
    ]
    for row in rows:
        assert row["status"] == "ok" and row["routing"] == "forced" and row["step_ms"] > 0
        assert row["busiest_rank_load"] == pytest.approx(row["overload"], abs=0.01)
    assert "forced routing: busiest expert" in done.stdout and "busiest rank 1.50 x" in done.stdout


@pytest.mark.slow
def test_whole_steps_with_redundant_experts(tmp_path: Path) -> None:
    """Two experts of the first of two ranks are busy, in two layers; steps are those without them, and each call of a
    layer has its time."""
    out = tmp_path / "rows.jsonl"
    done = bench(
        *(*SMALL, "--experts", "8", "--step", "--overload", "1.0", "1.3", "--redundant-experts", "1", "2"),
        *("--hot-experts", "2", "--out", str(out)),
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    rows = document(done)["rows"]
    names = ["reference-expanded", "reference-expanded+redundant-1", "reference-expanded+redundant-2"]
    assert [(row["overload"], row["variant"]) for row in rows] == [(x, name) for x in (1.0, 1.3) for name in names]
    for number, row in enumerate(rows):
        slots, busy = number % 3, number > 2
        assert row["status"] == "ok" and row["redundant_experts"] == slots and row["hot_experts"] == 2
        assert worst(row["relative_l2"].values()) < 1e-5  # loss and gradient norm, against those without
        assert row["busiest_rank_load"] == pytest.approx(row["overload"], abs=0.02)
        assert row["received_overload"] < 1.02 if slots and busy else row["received_overload"] >= 1.0
        # Slots in fp32: fc1 [2 * 64, 128] and fc2 [128, 64], weights and gradients.
        assert row["replica_slots_mib"] == round(slots * 2 * 4 * 3 * 64 * 128 / 2**20, 2)
        planned = {"prefetch", "return"} if slots and busy else set()
        timed = {name for name in CALLS if row.get(f"{name}_us")}
        assert timed == ({"counts", "plan", "map"} | planned if slots else set())
        assert all(row[f"{name}_p20_us"] <= row[f"{name}_us"] <= row[f"{name}_p80_us"] for name in timed)
        assert row.get("replicas", 0) > 0 if planned else not row.get("replicas")
    assert rows[3]["received_overload"] == pytest.approx(1.3, abs=0.02)
    assert "redundant experts, custom, reference-expanded, grouped experts:" in done.stdout
    assert "  2 slots: " in done.stdout
    assert len(out.read_text().splitlines()) == 1 + len(rows)


def steps(times: dict[int, dict[float, float]]) -> list[dict[str, Any]]:
    """Rows of steps: by replica slots and overload, milliseconds."""
    return [
        row(f"ep-expanded+redundant-{slots}" if slots else "ep-expanded", 0, ms)
        | {"shape": "tiny", "redundant_experts": slots, "overload": x, "received_overload": x, "replica_slots_mib": 9.0}
        for slots, by_overload in times.items()
        for x, ms in by_overload.items()
    ]


def test_what_redundant_experts_give() -> None:
    rows = steps(
        {
            0: {1.0: 100.0, 1.5: 120.0, 2.0: 140.0},
            1: {1.0: 101.0, 1.5: 118.0, 2.0: 130.0},
            2: {1.0: 104.0, 1.5: 124.0, 2.0: 144.0},
            3: {1.0: 100.0, 1.5: 110.0, 2.0: 100.0},
        }
    )
    rows[3] |= {"plan_us": 12.0, "replicas": 4}
    lines = what_replicas_give([*rows, {"variant": "compact", "status": "unavailable"}]).splitlines()
    assert lines[0] == "redundant experts, tiny, ep-expanded, megatron experts:"
    assert [line.split()[:2] for line in lines[2:6]] == [["1", "0"], ["1", "1"], ["1", "2"], ["1", "3"]]
    cells = [line.split() for line in lines[2:14]]
    # 20 ms are lost at 1.5 and 40 at 2: of these 2 and 10, -4 and -4, 10 and 40 come back.
    assert [cell[7] for cell in cells] == ["-"] * 5 + ["10", "-20", "50", "-", "25", "-10", "100"]
    assert cells[1][6] == "1.010" and cells[0][6] == "-"
    assert cells[1][3] == "4" and cells[1][9] == "12"
    # Between 1 and 1.5 one slot goes from 1 ms lost to 2 ms won.
    assert lines[14:] == [
        "  1 slot: pay from an overload of 1.17, between those measured",
        "  2 slots: do not pay at overload 2, the largest here",
        "  3 slots: pay at each overload here, from 1",
    ]
    assert what_replicas_give(rows[:3]) == ""
    one = steps({0: {1.5: 3.0}, 1: {1.5: 2.0}})
    assert what_replicas_give(one).splitlines()[-1] == "  1 slot: two values of --overload say from which they pay"
    noise = {0: {1.0: 5.0, 1.5: 5.0, 2.0: 5.0}, 1: {1.0: 4.0, 1.5: 6.0, 2.0: 3.0}}  # ms lost: -1, 1, -2
    assert "pay from an overload of 1.67" in what_replicas_give(steps(noise))


def test_forced_logits_have_the_routers_gradient() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    values = torch.arange(18.0).view(3, 6)
    logits = _forced(lambda hidden: hidden @ weight, values)(torch.ones(3, 1, 4))
    assert logits.shape == (3, 1, 6) and logits.detach().flatten(0, 1).equal(values)
    (logits * 2).sum().backward()
    assert weight.grad is not None and weight.grad.eq(6).all()


def test_kinds_of_experts_unless_asked_for() -> None:
    assert parse(["--step"]).expert_backends == ["megatron", "grouped"]
    assert parse(["--tune"]).expert_backends == parse(["--step", "--tune"]).expert_backends == ["megatron"]
    assert parse(["--step", "--redundant-experts", "1"]).expert_backends == ["grouped"]
    assert owner(["megatron"]) == "megatron"  # as Megatron stores them, where there is nothing to share


def test_what_the_table_says_of_experts() -> None:
    def timed(variant: str, experts: str, step_ms: float, layout: str | None = None, noise: str = "") -> dict[str, Any]:
        return row(variant, 0, step_ms, noise) | {"expert_backend": experts, "layout": layout}

    stock, fused = timed("alltoall", "megatron", 50.0), timed("alltoall+fused-permute", "megatron", 42.0)
    ours = timed("expanded", "grouped", 20.0, "expanded")
    missing = {"variant": "expanded", "expert_backend": "deepgemm", "status": "unavailable"}
    assert what_experts_give([stock, fused, timed("alltoall", "grouped", 45.0), ours, missing]) == [
        "grouped experts, expanded: 2.10 x the tokens/s of Megatron's best (alltoall+fused-permute, megatron experts)"
    ]
    mixed = timed("expanded", "megatron", 40.0, "expanded", "it varies")
    assert what_experts_give([fused, mixed, ours]) == [
        "grouped experts, expanded: 2.00 x the tokens/s of Megatron's best (expanded, megatron experts), 2.10 x with "
        "Megatron's dispatchers (alltoall+fused-permute, megatron experts); noisy rows"
    ]
    assert what_experts_give([stock, timed("expanded", "grouped", 60.0, "expanded")]) == [
        "grouped experts: Megatron's own are faster here and should be kept, 1.20 x the tokens/s "
        "(alltoall, megatron experts; expanded)"
    ]
    waiting = timed("expanded+waiting-overlap", "grouped", 10.0, "expanded")
    assert what_experts_give([fused, waiting, ours]) == what_experts_give([fused, ours])
    assert what_experts_give([stock, missing]) == what_experts_give([ours]) == []


def row(variant: str, num_sms: int, step_ms: float, noise: str = "") -> dict[str, Any]:
    layout = variant.partition("+")[0]
    row = {
        "overlap": variant.endswith("overlap"),
        "waits": variant.endswith("waiting-overlap"),
        "max_connections": "32",
        "variant": variant,
        "layout": layout,
        "num_sms": num_sms,
        "step_ms": step_ms,
        "noise": noise,
    }
    return row | {"expert_backend": "megatron", "status": "ok"}


def test_the_advice_is_the_best_row() -> None:
    rows = [row("compact+fused-permute", 24, 50.0), row("expanded", 32, 40.2), row("expanded", 14, 40.0)]
    lines = advice(
        [*rows, row("alltoall", 0, 1.0) | {"layout": None}, {"variant": "compact", "status": "unavailable"}]
    ).splitlines()
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["compact+fused-permute", "24", "50.00"],
        ["expanded", "14", "40.00"],
        ["expanded", "32", "40.20"],
    ]
    assert [line.count("#") for line in lines[1:4]] == [40, 32, 32]
    assert lines[4:] == [
        "best: expanded, 14 SMs, 40.00 ms a step",
        "within 1% of it: expanded, 32 SMs",
        "export MCORE_DEEPEP_V2_NUM_SMS=14",
        "export MCORE_DEEPEP_V2_LAYOUT=expanded",
    ]
    both = advice([*rows, row("expanded", 14, 39.0) | {"expert_backend": "grouped"}]).splitlines()
    assert "best: expanded, 14 SMs, grouped experts, 39.00 ms a step" in both
    assert both[-1] == "export MCORE_DEEPEP_V2_EXPERTS=grouped"
    lines = advice([row("compact+fused-permute", 24, 30.0, "it varies"), *rows]).splitlines()
    assert lines[-4] == "best: compact+fused-permute, 24 SMs, 30.00 ms a step (a noisy row)"
    assert lines[-1] == "and Megatron's --moe-permute-fusion"
    lines = advice([row("compact+fused-permute+overlap", 24, 30.0), *rows]).splitlines()
    assert lines[-2:] == [
        "and Megatron's --moe-permute-fusion",
        "and Megatron's --moe-shared-expert-overlap (measured with CUDA_DEVICE_MAX_CONNECTIONS=32)",
    ]
    waiting = row("expanded+waiting-overlap", 14, 30.0)  # in the curve, but no setting gives it
    lines = advice([*rows, waiting]).splitlines()
    assert "expanded+waiting-overlap" in lines[4] and lines[5].startswith("best: expanded, 14 SMs")
    assert lines[6] == "within 1% of it: expanded, 32 SMs"
    assert advice([waiting]) == advice([]) == "nothing could be measured, so there is nothing to advise"


def test_the_work_of_a_step_against_a_count_of_the_models_own_parameters() -> None:
    """Qwen3-30B-A3B by hand, and its published sizes: 30.5 B parameters, 3.3 B of them active."""
    model = SHAPES["30b-a3b"]
    attention = 2048 * (32 * 128) * 2 + 2048 * (4 * 128) * 2
    active = 48 * (attention + 2048 * 128 + 8 * 3 * 2048 * 768) + 256 * 2048
    flops = 10 * 3 * (2 * active + 48 * 2 * 4096 * 32 * 128)
    assert step_flops(model, 0, 10) == flops
    assert step_flops(model, 4096, 10) == flops + 10 * 3 * 2 * 48 * 3 * 2048 * 4096
    embeddings = 151936 * 2048
    assert active + 2 * embeddings == pytest.approx(3.3e9, rel=0.02)
    per_layer = attention + 2048 * 128 + 128 * 3 * 2048 * 768
    assert 48 * per_layer + 2 * embeddings == pytest.approx(30.5e9, rel=0.01)
    shared_by_8 = attention + 2048 * 128 + 16 * 3 * 2048 * 768
    assert layers_that_fit(model, 0, 8, 5 * shared_by_8 + 2 * 256 * 2048) == 5
    assert layers_that_fit(model, 0, 8, 5 * shared_by_8 + 2 * 256 * 2048 - 1) == 4
    assert layers_that_fit(model, 0, 8, 1) == 1
    assert layers_that_fit(model, 100, 8, 5 * (shared_by_8 + 3 * 2048 * 100) + 2 * 256 * 2048) == 5


_now = 0.0  # seconds, of the clock that the next test puts in


class _Slow(torch.autograd.Function):
    """Takes a while forward, and twice as long backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        global _now
        ctx.seconds = seconds
        _now += seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        global _now
        _now += 2 * ctx.seconds
        return grad, None


def test_shares_are_of_dispatch_and_combine_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ep_v2.bench.step.sections.time.perf_counter", lambda: _now)
    watch = Stopwatch(torch.device("cpu"))
    dispatcher = SimpleNamespace(
        dispatch_preprocess=lambda hidden, routing_map, probs: (_Slow.apply(hidden, 0.01), probs),
        token_dispatch=lambda hidden, probs: (_Slow.apply(hidden, 0.01), probs),
        dispatch_postprocess=lambda hidden, probs: (hidden, "counts", probs),
        combine_preprocess=lambda rows: rows,
        token_combine=lambda rows: _Slow.apply(rows, 0.04),
        combine_postprocess=lambda hidden: hidden,
    )
    watched = Watched(dispatcher, watch)
    x = torch.ones(3, requires_grad=True)
    for _ in range(2):
        rows, probs = watched.dispatch_preprocess(x, None, torch.ones(3))
        rows, counts, _ = watched.dispatch_postprocess(*watched.token_dispatch(rows, probs))
        assert counts == "counts"
        rows = _Slow.apply(rows, 0.05)  # the experts
        watched.combine_postprocess(watched.token_combine(watched.combine_preprocess(rows))).sum().backward()
    spent = watch.milliseconds()
    assert spent == {"dispatch": pytest.approx(2 * 3 * 20), "combine": pytest.approx(2 * 3 * 40)}
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_what_bounds_the_shortest_step() -> None:
    kernels = {"void deep_ep::elastic::dispatch_impl<true, 4>(int)": 2.04, "_add": 1.96}
    kernels["void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous name"] = 1.0
    kernels["_ZN7cutlass13device_kernelIN2at4cuda6detail25enable_3x_kernel_for_sm9xINS_4gemm6kernel13GemmUniversa"] = (
        0.9
    )
    traced = {"gpu_busy_percent": 93.2, "gpu_idle_percent": 1.4, "launches": 870, "longest_kernels_ms": kernels}
    rows = [row("expanded", 0, 60.0) | traced, row("sync-free+graph", 0, 40.0) | traced | {"expert_backend": "grouped"}]
    assert what_bounds([*rows, {"variant": "compact", "status": "unavailable"}]) == [
        "sync-free+graph, grouped experts: the GPU computes for 93 % of the step; in a traced one it has 870 launches "
        "and is idle for 1 %",
        "  longest: 2.0 ms dispatch_impl, 2.0 ms _add, 1.0 ms multi_tensor_apply_kernel, 0.9 ms cutlass::device_kernel",
    ]
    assert what_bounds([row("expanded", 0, 60.0) | {"longest_kernels_ms": None}]) == []
