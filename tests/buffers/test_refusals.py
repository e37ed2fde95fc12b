"""Wrong input in any call of the reference buffer, of one rank or of all: every rank raises, and the group goes on."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_ep_v2.buffers.contract import BufferSpec
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.errors import GroupMismatchError, InputError, PeerError, TokenCapacityError
from megatron_ep_v2.fused_a2a import fused_combine, fused_dispatch
from megatron_ep_v2.serving import Decode, DecodeGraphs, PrepareFinalize
from megatron_ep_v2.sync_free import sync_free_combine, sync_free_dispatch
from tests.helpers.cases import Case, make_batch
from tests.helpers.harness import isolated, run_ranks
from tests.helpers.reports import Report, assert_report, attempt

CULPRIT, RANKS = 1, 3
CASE = Case("batch", (3, 5, 4), "drop some selections", experts=6, dtype=torch.float64)
E5M2 = torch.float8_e5m2


@dataclass
class Layer:
    """What a rank has after its dispatch."""

    buffer: ReferenceBuffer
    rows: torch.Tensor
    weights: torch.Tensor
    handle: Any
    hidden: torch.Tensor
    probs: torch.Tensor

    def combine(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> Any:
        return self.buffer.combine(rows, self.handle, weights)

    def first(self, x: Any) -> Any:
        more = {"num_experts": CASE.experts, "do_expand": self.handle.do_expand}
        return self.buffer.dispatch(x, topk_idx=self.handle.topk_idx, topk_weights=self.probs, **more)

    def again(self, hidden: torch.Tensor, probs: torch.Tensor | None = None, **more: Any) -> Any:
        given = {"topk_weights": probs, "handle": self.handle, "do_expand": self.handle.do_expand}
        return self.buffer.dispatch(hidden, **{**given, **more})


# name -> (the call as the others make it, as the culprit makes it, words of the culprit's error)
Call = Callable[[Layer], Any]
COMBINE, WITH_WEIGHTS = (lambda a: a.combine(a.rows)), (lambda a: a.combine(a.rows, a.weights))
GRADIENT, REPLAY = (lambda a: a.again(a.hidden)), (lambda a: a.again(a.hidden, a.probs))
WRONG: dict[str, tuple[Call, Call, tuple[str, ...]]] = {
    "combine: a row is missing": (COMBINE, lambda a: a.combine(a.rows[1:]), ("rows to combine", "hidden")),
    "combine: no matrix": (COMBINE, lambda a: a.combine(a.rows[:, 0]), ("rows to combine",)),
    "combine: fp8": (
        COMBINE,
        lambda a: a.combine(a.rows.to(torch.float8_e4m3fn)),
        ("rows to combine", "float8", "not fp8"),
    ),
    "combine: integers": (COMBINE, lambda a: a.combine(a.rows.int()), ("cannot carry torch.int32",)),
    "combine: a weight is missing": (
        WITH_WEIGHTS,
        lambda a: a.combine(a.rows, a.weights[1:]),
        ("weights to combine",),
    ),
    "combine: weights of another layout": (
        WITH_WEIGHTS,
        lambda a: a.combine(a.rows, a.weights.new_ones((*a.weights.shape, 1))),
        ("weights to combine",),
    ),
    "combine: bf16 weights": (
        WITH_WEIGHTS,
        lambda a: a.combine(a.rows, a.weights.bfloat16()),
        ("weights to combine", "bfloat16", "needed: torch.float"),
    ),
    "dispatch: scales of other tokens": (
        lambda a: a.first(a.hidden),
        lambda a: a.first((torch.ones(len(a.hidden), 128).to(torch.float8_e4m3fn), torch.ones(2, 1))),
        ("scales",),
    ),
    "gradient: another batch": (GRADIENT, lambda a: a.again(a.hidden[1:]), ("cached dispatch", "tokens")),
    "gradient: no matrix": (GRADIENT, lambda a: a.again(a.hidden[0]), ("matrix",)),
    "gradient: another layout": (
        GRADIENT,
        lambda a: a.again(a.hidden, do_expand=not a.handle.do_expand),
        ("handle's layout", "do_expand"),
    ),
    "gradient: e5m2": (GRADIENT, lambda a: a.again(a.hidden.to(E5M2)), ("cannot carry torch.float8_e5m2",)),
    "replay: narrow weights": (REPLAY, lambda a: a.again(a.hidden, a.probs[:, 1:]), ("cached dispatch", "weights")),
    "replay: selections": (
        REPLAY,
        lambda a: a.again(a.hidden, a.probs, topk_idx=a.handle.topk_idx),
        ("topk_idx and handle",),
    ),
}
# name -> what one rank does, while the others combine; nothing in it is wrong by itself
DIFFERENT: dict[str, tuple[Call, str]] = {
    "hidden": (lambda a: a.combine(a.rows[:, :16]), "hidden: rank 1 has 16; the others have 32"),
    "dtype": (lambda a: a.combine(a.rows.float()), "payload dtype: rank 1 has torch.float32"),
    "weights": (WITH_WEIGHTS, "bytes per weight: rank 1 has 4; the others have 0"),
    "call": (GRADIENT, "call: rank 1 has cached dispatch; the others have combine"),
}


def dispatched(group: Any, do_expand: bool) -> Layer:
    spec = BufferSpec(num_max_tokens_per_rank=8, hidden=CASE.hidden, num_topk=CASE.topk, num_experts=CASE.experts)
    buffer, batch = ReferenceBuffer(group, spec), make_batch(CASE, group.rank())
    rows, _, weights, handle, _ = buffer.dispatch(
        batch.x, topk_idx=batch.topk_idx, topk_weights=batch.topk_weights, num_experts=CASE.experts, do_expand=do_expand
    )
    return Layer(buffer, rows, weights, handle, batch.x, batch.topk_weights)


def copies(rank: int, do_expand: bool) -> torch.Tensor:
    """[T, 1]: how many rows of each token come back: one for each selection, or for each rank with one."""
    selected = make_batch(CASE, rank).topk_idx
    experts = torch.zeros(len(selected), CASE.experts + 1, dtype=torch.bool).scatter_(1, selected % 7, True)[:, :6]
    ranks = experts.view(len(selected), RANKS, -1).any(dim=2)
    return (experts if do_expand else ranks).sum(dim=1, keepdim=True)


@isolated
def refuse(group: Any, do_expand: bool, culprits: list[int]) -> dict[str, tuple[Report | None, bool]]:
    """The error of each wrong call, and whether the same call is right when it is made as it should be."""
    layer, mine = dispatched(group, do_expand), group.rank() in culprits
    expected = layer.hidden * copies(group.rank(), do_expand)
    found = {}
    for name, (good, bad, _) in WRONG.items():
        report = attempt(functools.partial(bad if mine else good, layer))
        answer = good(layer)
        if name.startswith("combine"):
            right = torch.allclose(answer[0], expected, rtol=1e-14)
        else:
            right = torch.equal(answer[0].nan_to_num(), layer.rows.nan_to_num())
        found[name] = report, right
    for name, (different, _) in DIFFERENT.items() if culprits == [CULPRIT] else ():
        report = attempt(functools.partial(different if mine else COMBINE, layer))
        found[name] = report, torch.allclose(layer.combine(layer.rows)[0], expected, rtol=1e-14)
    found["rows are freed"] = None, refused_rows_are_freed(layer)
    return found


def refused_rows_are_freed(layer: Layer) -> bool:
    """At once, and not when the garbage collector comes by."""
    gc.disable()
    try:
        alive = []
        for call, rows in ((layer.combine, layer.rows[1:].clone()), (layer.again, layer.hidden[1:].clone())):
            alive.append(weakref.ref(rows))
            report = attempt(functools.partial(call, rows))
            assert report is not None
            del rows
        return [rows() for rows in alive] == [None, None]
    finally:
        gc.enable()


CULPRITS = pytest.mark.parametrize("culprits", [[CULPRIT], [0, 1, 2]], ids=["one rank", "every rank"])


@CULPRITS
@pytest.mark.parametrize("do_expand", [False, True], ids=["compact", "expanded"])
def test_every_rank_raises_and_the_right_call_works(do_expand: bool, culprits: list[int]) -> None:
    for rank, found in enumerate(run_ranks(RANKS, refuse, do_expand, culprits)):
        for name, (_, _, words) in WRONG.items():
            if rank in culprits:
                assert_report(found[name][0], InputError, f"rank {rank}", *words)
            else:
                kind = name.partition(":")[0]
                call = kind if kind in ("combine", "dispatch") else "cached dispatch"
                assert_report(found[name][0], PeerError, f"this {call} was given up because rank {CULPRIT} refused")
        for name, (_, words) in DIFFERENT.items() if culprits == [CULPRIT] else ():
            assert_report(found[name][0], GroupMismatchError, words)
        assert all(right for _, right in found.values()), {name: right for name, (_, right) in found.items()}


@isolated
def refuse_handles(group: Any) -> tuple[Report | None, torch.Tensor]:
    """A rank combines by the handle of another dispatch, of equal sizes."""
    first = dispatched(group, False)
    batch = make_batch(CASE, group.rank())
    *_, other, _ = first.buffer.dispatch(batch.x, topk_idx=batch.topk_idx, num_experts=CASE.experts)
    report = attempt(lambda: first.buffer.combine(first.rows, other if group.rank() == CULPRIT else first.handle))
    return report, first.combine(first.rows)[0]


def test_handles_of_different_dispatches() -> None:
    for rank, (report, combined) in enumerate(run_ranks(RANKS, refuse_handles)):
        assert_report(report, GroupMismatchError, "number of the dispatch: rank 1 has 2; the others have 1")
        assert torch.allclose(combined, make_batch(CASE, rank).x * copies(rank, False), rtol=1e-14)


def layer_step(group: Any, sync_free: bool) -> tuple[Report | None, torch.Tensor, torch.Tensor]:
    """A layer whose experts lose a row on one rank, then return all: the error, output and gradient."""
    batch = make_batch(CASE, group.rank())
    hidden, probs = batch.x.requires_grad_(), batch.topk_weights.double()
    if sync_free:
        rows, _, _, handle = sync_free_dispatch(hidden, batch.topk_idx, probs, CASE.experts, group)
        combine: Callable[[torch.Tensor], torch.Tensor] = lambda rows: sync_free_combine(rows, group, handle)  # noqa: E731
    else:
        rows, _, _, _, handle = fused_dispatch(hidden, batch.topk_idx, probs, CASE.experts, group, do_expand=True)
        combine = lambda rows: fused_combine(rows, group, handle)[0]  # noqa: E731
    report = attempt(lambda: combine(rows[1:] if group.rank() == CULPRIT else rows))
    output = combine(rows)
    output.backward(torch.ones_like(output))
    assert hidden.grad is not None
    return report, output.detach(), hidden.grad


@isolated
def both_layers(group: Any) -> list[Any]:
    return [layer_step(group, sync_free) for sync_free in (False, True)]


def test_experts_that_lose_a_row() -> None:
    for rank, found in enumerate(run_ranks(RANKS, both_layers)):
        times = copies(rank, True).double()
        for report, output, gradient in found:
            if rank == CULPRIT:
                assert_report(report, InputError, "rows")
            else:
                assert_report(report, PeerError, f"this combine was given up because rank {CULPRIT} refused")
            assert torch.allclose(output, make_batch(CASE, rank).x * times, rtol=1e-14)
            assert torch.allclose(gradient, times.expand_as(gradient), rtol=1e-14)


# ---------------------------------------------------------------------------------------------------------- serving

HIDDEN = 40  # widened to 256
SERVED = Case("served", (3, 5, 4), "drop some selections", experts=6, hidden=HIDDEN, dtype=torch.float64)
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# name -> (what the culprit brings instead, words of its error)
WRONG_TOKENS: dict[str, tuple[Callable[..., Given], tuple[str, ...]]] = {
    "wider": (lambda x, i, w: (torch.cat([x, x], dim=1), i, w), ("(5, 80)", "[rows, 40]")),
    "narrower": (lambda x, i, w: (x[:, 1:], i, w), ("(5, 39)", "[rows, 40]")),
    "as wide as the wire": (lambda x, i, w: (x.new_ones(5, 256), i, w), ("(5, 256)", "[rows, 40]")),
    "no matrix": (lambda x, i, w: (x[0], i, w), ("(40,)", "[rows, 40]")),
    "dtype": (lambda x, i, w: (x.float(), i, w), ("torch.float32", "needed: torch.float64")),
    "top-k": (lambda x, i, w: (x, i[:, :2], w[:, :2]), ("(5, 2)", "[5, 3]")),
    "selections": (lambda x, i, w: (x, i[1:], w[1:]), ("topk_idx",)),
    "weights": (lambda x, i, w: (x, i, w[:, :1]), ("topk_weights",)),
    "int32": (lambda x, i, w: (x, i.int(), w), ("torch.int32",)),
    "tokens": (lambda x, i, w: (x.repeat(2, 1), i.repeat(2, 1), w.repeat(2, 1)), ("10 tokens",)),
}
WRONG_ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "wider": lambda rows: torch.cat([rows, rows], dim=1),
    "narrower": lambda rows: rows[:, 1:],
    "as wide as the wire": lambda rows: rows.new_ones(len(rows), 256),
    "dtype": lambda rows: rows.float(),
    "fewer": lambda rows: rows[1:],
}


def served(work: Decode) -> torch.Tensor:
    """Each expert passes its rows through."""
    return work.rows * (work.topk_idx >= 0).sum(dim=1, keepdim=True)


@isolated
def serve(group: Any, culprits: list[int]) -> dict[str, Any]:
    """The reports of wrong calls by phase and name; and the outputs of right ones after them."""
    batch, wrong = make_batch(SERVED, group.rank()), group.rank() in culprits
    given = batch.x, batch.topk_idx, batch.topk_weights
    sizes = {"num_experts": 6, "num_topk": 3, "max_prefill_tokens": 8, "max_decode_tokens": 8}
    pair = PrepareFinalize(group, hidden=HIDDEN, dtype=torch.float64, **sizes)
    graphs = DecodeGraphs(pair, served, "cpu")
    phases: dict[str, Callable[..., Any]] = {
        "prefill": lambda *given: pair.finalize(pair.prepare_prefill(*given).rows),
        "decode": lambda *given: pair.finalize(served(pair.prepare_decode(*given, bucket=8))),
        "graph": lambda *given: graphs(*given, bucket=8).clone(),
    }
    found: dict[str, Any] = {}
    for phase, call in phases.items():
        for name, (change, _) in WRONG_TOKENS.items():
            found[phase, name] = attempt(functools.partial(call, *(change(*given) if wrong else given)))
        found[phase, "after"] = call(*given)

    work = pair.prepare_decode(*given, bucket=8)
    rows = served(work)
    for name, change_rows in WRONG_ROWS.items():
        found["finalize", name] = attempt(functools.partial(pair.finalize, change_rows(rows) if wrong else rows))
    found["busy"] = attempt(lambda: pair.prepare_prefill(*given))
    found["finalize", "after"] = pair.finalize(rows)
    pair.prepare_prefill(*given)
    pair.abandon()
    found["abandoned", "after"] = pair.finalize(pair.prepare_prefill(*given).rows)
    return found


@CULPRITS
def test_a_serving_pair_refuses_what_it_was_not_made_for(culprits: list[int]) -> None:
    for rank, found in enumerate(run_ranks(RANKS, serve, culprits)):
        expected = make_batch(SERVED, rank).x * (make_batch(SERVED, rank).topk_idx >= 0).sum(dim=1, keepdim=True)
        assert_report(found.pop("busy"), InputError, "slot 0 still holds", "abandon")
        for (phase, name), answer in found.items():
            if name == "after":
                assert torch.allclose(answer, expected, rtol=1e-14), phase
            elif rank not in culprits:
                assert_report(answer, PeerError, f"rank {CULPRIT} refused")
            elif phase == "finalize":
                assert_report(
                    answer, InputError, f"rank {rank}", "rows to combine" if name == "fewer" else "serving pair"
                )
            elif rank == CULPRIT:
                kind = TokenCapacityError if (phase, name) == ("prefill", "tokens") else InputError
                assert_report(answer, kind, f"rank {rank}", *WRONG_TOKENS[name][1])
