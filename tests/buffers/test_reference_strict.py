"""The reference buffer as it is by default: it refuses what the newest DeepEP would refuse on GPUs."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.buffers.ep import EPBuffer
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.errors import InputError, PeerError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from tests.helpers.cases import Case, make_batch, strided_copy
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.reports import Report, assert_report, attempt

STRICT = "MCORE_DEEPEP_V2_REFERENCE_STRICT"
DEFAULT = {STRICT: ""}  # as if it were unset
SAYS = "the strict reference buffer refuses what DeepEP would refuse on GPUs"
OFF = f"set {STRICT}=off"

GOOD = BufferSpec(num_max_tokens_per_rank=8, hidden=256, num_topk=3, num_experts=4)
# name -> (what is asked for, ranks, what both buffers must say)
BEYOND: dict[str, tuple[BufferSpec, int, tuple[str, str]]] = {
    "hidden": (replace(GOOD, hidden=384), 2, ("hidden=384", "a multiple of 256")),
    "top-k": (replace(GOOD, num_topk=33), 2, ("top-k=33", "1 to 32")),
    "ranks": (replace(GOOD, num_experts=1025), 1025, ("1025 ranks", "at most 1024")),
    "experts": (replace(GOOD, num_experts=2064), 16, ("2064 experts", "at most 2048")),
    "experts of a rank": (replace(GOOD, num_experts=1026), 2, ("513 experts a rank", "at most 512")),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_shape_beyond_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, ranks, words = BEYOND[name]
    group = types.SimpleNamespace(size=lambda: ranks, rank=lambda: 1)
    on_gpu = attempt(lambda: EPBuffer(group, spec, settings.resolve({}), ["a"] * ranks))
    monkeypatch.setattr(settings, "_active", settings.resolve({}))
    assert_report(attempt(lambda: ReferenceBuffer(group, spec)), InputError, SAYS, OFF, *words)
    assert_report(on_gpu, InputError, f"{STRICT}=off", *words)
    monkeypatch.setattr(settings, "_active", settings.resolve({STRICT: "off"}))
    assert not ReferenceBuffer(group, spec).strict


CASE = Case("strict", (5, 4), hidden=256, experts=4, dtype=torch.bfloat16)
CULPRIT = 1
FP8 = torch.float8_e4m3fn
# name -> (arguments of a dispatch that replace good ones, made from those, and what the error must say)
Change = Callable[[dict[str, Any]], dict[str, Any]]
DISPATCHES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "fp32": (lambda a: {"x": a["x"].float()}, ("torch.float32", "torch.bfloat16 [rows, 256]", "--bf16")),
    "fp16": (lambda a: {"x": a["x"].half()}, ("torch.float16", "--bf16")),
    "fp64": (lambda a: {"x": a["x"].double()}, ("torch.float64", "--bf16")),
    "fp8 without scales": (lambda a: {"x": a["x"].to(FP8)}, ("torch.float8_e4m3fn", "torch.bfloat16 [rows, 256]")),
    "bf16 with scales": (lambda a: {"x": (a["x"], torch.ones(len(a["x"]), 2))}, ("torch.float8_e4m3fn [rows, 256]",)),
    "hidden": (lambda a: {"x": a["x"].repeat(1, 2)}, ("512)", "[rows, 256]", "one hidden size for all layers")),
    "fp8 hidden": (
        lambda a: {"x": (a["x"].repeat(1, 2).to(FP8), torch.ones(len(a["x"]), 4))},
        ("512)", "torch.float8_e4m3fn [rows, 256]"),
    ),
    "top-k": (
        lambda a: {
            "topk_idx": a["topk_idx"][:, :2].contiguous(),
            "topk_weights": a["topk_weights"][:, :2].contiguous(),
        },
        ("top-k", "2)", "3]", "one top-k for all layers"),
    ),
    "experts": (lambda a: {"num_experts": 1026}, ("513 experts a rank",)),
    "strided rows": (lambda a: {"x": strided_copy(a["x"])}, ("strides (1024, 2)", "contiguous")),
    "strided selections": (lambda a: {"topk_idx": strided_copy(a["topk_idx"])}, ("topk_idx.contiguous()",)),
    "strided weights": (lambda a: {"topk_weights": strided_copy(a["topk_weights"])}, ("topk_weights.contiguous()",)),
}
# The same of a combine: rows -> rows.
COMBINES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[str, ...]]] = {
    "fp32": (lambda rows: rows.float(), ("torch.float32", "--bf16")),
    "hidden": (lambda rows: rows[:, :128].contiguous(), ("128)", "[rows, 256]")),
    "strided": (strided_copy, ("strides (1024, 2)",)),
}


def dispatch_of(group: Any) -> dict[str, Any]:
    batch = make_batch(CASE, group.rank())
    return {
        "x": batch.x,
        "topk_idx": batch.topk_idx.contiguous(),
        "topk_weights": batch.topk_weights,
        "num_experts": CASE.experts,
    }


@isolated
def refuse(group: Any, alone: bool) -> dict[str, Report | None]:
    """What is raised by wrong calls; `alone` on one rank. Good ones come between them, with right values."""
    buffer, good = ReferenceBuffer(group, replace(GOOD, num_max_tokens_per_rank=5)), dispatch_of(group)
    wrong = not alone or group.rank() == CULPRIT
    found: dict[str, Report | None] = {}
    for name, (change, _) in DISPATCHES.items():
        arguments = {**good, **change(good)} if wrong else good
        found[f"dispatch {name}"] = attempt(functools.partial(buffer.dispatch, **arguments))
    rows, _, _, handle, _ = buffer.dispatch(**good)
    for name, (change_rows, _) in COMBINES.items():
        found[f"combine {name}"] = attempt(
            functools.partial(buffer.combine, change_rows(rows) if wrong else rows, handle)
        )
        hidden = change_rows(good["x"]) if wrong else good["x"]
        found[f"cached {name}"] = attempt(functools.partial(buffer.dispatch, hidden, handle=handle))
    for name in ("hidden", "fp32"):  # and the rows arrived in spite of all that
        assert f"combine {name}" in found
    times = torch.zeros(len(good["x"]), 2, dtype=torch.bool).scatter_(1, good["topk_idx"] // 2, True).sum(dim=1)
    assert torch.equal(buffer.combine(rows, handle)[0], good["x"] * times[:, None])
    again = buffer.dispatch(good["x"], handle=handle)[0]
    assert isinstance(again, torch.Tensor) and torch.equal(again, rows)
    return found


@pytest.mark.parametrize("alone", [False, True], ids=["every rank", "one rank"])
def test_rows_that_deep_ep_does_not_carry(alone: bool) -> None:
    for rank, found in enumerate(run_ranks(2, refuse, alone, env=DEFAULT)):
        for call, report in found.items():
            kind, _, name = call.partition(" ")
            if alone and rank != CULPRIT:
                assert_report(report, PeerError, f"rank {CULPRIT} refused")
                continue
            words = (DISPATCHES if kind == "dispatch" else COMBINES)[name][1]
            assert_report(report, InputError, SAYS, OFF, *words)


@isolated
def two_layers(group: Any, off: bool) -> list[Report | None]:
    """Megatron's calls, with a second layer of another hidden size, and a third one in fp32."""
    if off:
        settings.activate(settings.resolve(reference_strict=False))
    reports = []
    for case in (CASE, replace(CASE, hidden=512), replace(CASE, hidden=40, dtype=torch.float32)):
        batch = make_batch(case, group.rank())

        def layer(case: Case = case, batch: Any = batch) -> None:
            given = (batch.x, batch.topk_idx, batch.topk_weights, case.experts, group)
            rows, *_, handle = fused_dispatch(*given, do_expand=True)
            output, _ = fused_combine(rows, group, handle)
            torch.testing.assert_close(output, batch.x * case.topk)

        reports.append(attempt(layer))
    return reports


def test_layers_of_one_group_are_alike_unless_the_setting_is_off() -> None:
    for first, wider, narrow in run_ranks(2, two_layers, False, env=DEFAULT):
        assert first is None
        assert_report(wider, InputError, SAYS, OFF, "one hidden size for all layers")
        assert_report(narrow, InputError, SAYS, OFF, "--bf16")
    assert run_ranks(2, two_layers, True, env=DEFAULT) == [[None] * 3] * 2


@isolated
def first_layer(group: Any) -> Report | None:
    batch = make_batch(replace(CASE, hidden=40), group.rank())
    return attempt(lambda: fused_dispatch(batch.x, batch.topk_idx, batch.topk_weights, CASE.experts, group))


def test_a_first_layer_of_another_width() -> None:
    for report in run_ranks(2, first_layer, env=DEFAULT):
        assert_report(report, InputError, SAYS, OFF, "hidden=40", "a multiple of 256")
