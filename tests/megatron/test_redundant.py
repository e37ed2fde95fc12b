"""Redundant experts in Megatron's MoE layer: outputs and every gradient as without them, and as a dense layer's."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import checkpoint
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import megatron_ep_v2
import megatron_ep_v2.megatron.expert_load
from megatron_ep_v2.balance import planner
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.redundancy import Moved
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.experts import redundant
from megatron_ep_v2.experts.gemm import GEMMS
from megatron_ep_v2.megatron.managers import ExpandedManager
from megatron_ep_v2.megatron.qwen3_moe.optimizer import collect_gradient
from megatron_ep_v2.megatron.redundant import RedundantManager
from megatron_ep_v2.watchdog.call_log import ENTERED
from megatron_ep_v2.watchdog.call_log import KINDS as CALLS
from tests.helpers.compare import worst
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import process_groups
from tests.helpers.redundant_layer import (
    BF16,
    add_layer,
    against_dense,
    build,
    check_steps,
    dense,
    inputs,
    install,
    routing,
    step,
    watched,
)
from tests.helpers.reports import attempt
from tests.helpers.shapes import CPU, Shape

KINDS = ("zipf", "one-hot", "empty", "unselected", "equal")
EXACT = replace(CPU, dtype=torch.float64, hidden=16, ffn=8)
MORE = {torch.float64: {"moe_router_dtype": "fp64"}, torch.float32: {}}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype
    scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
    return float((one - other).abs().max()) / scale if one.numel() else 0.0


def compared(group: Any, shape: Shape, slots: int, backend: str) -> dict[str, dict[str, Any]]:
    """By kind of routing: the largest differences to R = 0 and to the dense layer, and what was moved."""
    rank, found = group.rank(), {}
    with process_groups(), pytest.MonkeyPatch.context() as patch:
        if shape.dtype == torch.float64:  # the reference carries fp64 weights next to fp64 rows
            patch.setattr(ExpandedManager, "_probs_in_fp32", lambda self: self.token_probs)
        for kind in KINDS:
            tokens = 24 if kind == "equal" else 40 - 3 * rank  # 24 * top-3 is a multiple of the experts
            topk_idx = routing(kind, shape, rank, tokens)
            x, grad = inputs(shape, len(topk_idx))
            results, rows = [], []
            for number in (0, slots):
                layer = build(shape, backend, topk_idx, number, **MORE[shape.dtype])
                manager = layer.token_dispatcher._comm_manager
                assert isinstance(manager, RedundantManager) == bool(number)
                with watched() as seen:
                    results.append(step(layer, x, grad))
                rows.append(seen.rows[0])
                loads = [load.tolist() for load in megatron_ep_v2.expert_load()]
                results[-1]["load"] = torch.tensor(loads)
            plain, ours = results
            experts = layer.experts
            mine = (x, grad, layer.router.probs.detach(), experts.linear_fc1.weight, experts.linear_fc2.weight)
            parts: list[Any] = [None] * group.size()
            dist.all_gather_object(parts, tuple(tensor.detach() for tensor in mine))
            kinds: list[Any] = [None] * group.size()
            dist.all_gather_object(kinds, topk_idx)
            wanted = dense(shape, kinds, parts)
            local = slice(rank * len(experts.linear_fc1.weight), (rank + 1) * len(experts.linear_fc1.weight))
            w1, w2 = wanted.grad_experts.stacked()
            oracle = {
                "output": wanted.output[rank].view(x.shape),
                "x": wanted.grad_x[rank].view(x.shape),
                "experts.linear_fc1.weight": w1[local],
                "experts.linear_fc2.weight": w2[local],
            }
            found[kind] = {
                "to R = 0": {name: difference(ours[name], plain[name]) for name in plain},
                "to dense": {name: difference(ours[name].double(), value) for name, value in oracle.items()},
                "calls": seen.calls,
                "replicas": len(seen.counts[0]) > len(experts.linear_fc1.weight),
                "rows": (len(rows[0]), len(rows[1])),
                "same rows": torch.equal(rows[0], rows[1]),
            }
    return found


def assert_equal(by_rank: list[dict[str, dict[str, Any]]], shape: Shape) -> None:
    for kind in KINDS:
        for found in (by_kind[kind] for by_kind in by_rank):
            assert set(found["to R = 0"]) == {
                *("output", "x", "router.probs", "load"),
                *("experts.linear_fc1.weight", "experts.linear_fc2.weight"),
            }
            for against in ("to R = 0", "to dense"):
                for name, error in found[against].items():
                    assert error < TOLERANCE[shape.dtype], f"{kind}, {name} {against}: {error:.1e}"
        planned = kind in ("zipf", "one-hot", "unselected")
        before, after = zip(*(by_kind[kind]["rows"] for by_kind in by_rank), strict=True)
        if planned:
            # One micro-batch: weights to the slots once, since they still hold them in backward; a gradient a linear.
            assert all(by_kind[kind]["replicas"] for by_kind in by_rank), kind
            calls = ["prefetch_weights", "reduce_grads", "reduce_grads"]
            assert [by_kind[kind]["calls"] for by_kind in by_rank] == [calls] * len(by_rank)
            assert max(after) < max(before) and sum(after) == sum(before), kind
        else:
            assert all(by_kind[kind]["calls"] == [] and by_kind[kind]["same rows"] for by_kind in by_rank), kind


@pytest.mark.parametrize(
    ("ranks", "slots", "backend", "shape"),
    [
        (2, 1, "sequential", EXACT),
        (3, 2, "sequential", replace(EXACT, experts=6)),
        (2, 2, "grouped", replace(CPU, hidden=16, ffn=8)),
        pytest.param(4, 1, "sequential", EXACT, marks=pytest.mark.slow),
        pytest.param(4, 1, "grouped", replace(CPU, hidden=16, ffn=8), marks=pytest.mark.slow),
        pytest.param(4, 2, "sequential", EXACT, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "dtype", value),
)
def test_output_and_gradients_are_those_without_them(ranks: int, slots: int, backend: str, shape: Shape) -> None:
    assert_equal(run_ranks(ranks, compared, shape, slots, backend), shape)


# ----------------------------------------------------------------- several layers and micro-batches, and what must fail


def in_flight(backend: str, slots: int, **settings: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Two layers one after the other, two micro-batches forward before the first backward: outputs, every gradient, and
    the transfers."""
    rank = dist.get_rank()
    install(backend, slots, **settings)
    # Experts 0, 1 and 2 of rank 0 are busy, and rank 1 takes parts of two; in the second layer the other way round.
    first = torch.tensor([[3, 5, 6] if token % 4 == 0 else [0, 1, 2] for token in range(40 - rank)])
    other = EXACT.experts - 1 - first
    layers = [
        add_layer(EXACT, backend, topk_idx, std, **MORE[torch.float64])
        for topk_idx, std in ((first, 0.2), (other, 0.3))
    ]
    batches = [inputs(EXACT, 40 - rank, 3 * i) for i in (1, 2)]
    for x, _ in batches:
        x.requires_grad_()
    with watched() as seen:
        outputs = []
        for x, _ in batches:
            middle = layers[0](x)[0]
            outputs.append(layers[1](middle)[0])
        for y, (_, grad) in zip(reversed(outputs), reversed(batches), strict=True):
            y.backward(grad)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"x {i}": x.grad for i, (x, _) in enumerate(batches)}
    for n, layer in enumerate(layers):
        found |= {f"{n}.{name}": p.grad for name, p in layer.named_parameters()}
    return found, seen


def skip_backward_prefetch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(redundant._Fetched, "begin_again", lambda self: None)


def skip_reduce(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(redundant._Fetched, "return_grads", lambda *_: SimpleNamespace(wait=lambda: None))


def swap_slots(patch: pytest.MonkeyPatch) -> None:
    theirs = ReferenceBuffer.prefetch_weights

    def swapped(self: Any, slots: Any, weights: Any, mapping: Any) -> Any:
        transfer = theirs(self, slots, weights, mapping)

        def wait() -> None:
            transfer.wait()
            if bool((mapping[self.rank] >= 0).all()):  # both are in use
                for slot in slots.weights:
                    slot.copy_(slot.flip(0).clone())

        return SimpleNamespace(wait=wait)

    patch.setattr(ReferenceBuffer, "prefetch_weights", swapped)


def drop_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Moved, "wait", lambda self: [work.wait() for work in self._works] and None)


CONTROLS = {
    "skipped backward prefetch": skip_backward_prefetch,
    "skipped reduce": skip_reduce,
    "two slots swapped": swap_slots,
    "dropped wait": drop_wait,
}


def controlled(group: Any) -> dict[str, Any]:
    """Largest differences to R = 0: as it is, and with each step left out; NaN counts as a difference."""
    found: dict[str, Any] = {}
    with process_groups(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpandedManager, "_probs_in_fp32", lambda self: self.token_probs)
        wanted, seen = in_flight("sequential", 0)
        assert seen.calls == []
        for name in (None, *CONTROLS):
            with pytest.MonkeyPatch.context() as broken:
                if name is not None:
                    CONTROLS[name](broken)
                ours, seen = in_flight("sequential", 2)
            found[name or "whole"] = {key: difference(ours[key].nan_to_num(1e6), wanted[key]) for key in wanted}
            found.setdefault("calls", seen.calls)
    return found


def test_layers_and_micro_batches_share_the_slots_and_each_step_left_out_is_seen() -> None:
    by_rank = run_ranks(2, controlled)
    for found in by_rank:
        assert worst(found["whole"].values()) < 1e-12, found["whole"]
        # Forward 4 prefetches; backward: the last one's weights are still there, the other three are fetched again.
        assert found["calls"].count("prefetch_weights") == 4 + 3
        assert found["calls"].count("reduce_grads") == 4 * 2
    apart = {name: {key: worst(found[name][key] for found in by_rank) for key in by_rank[0][name]} for name in CONTROLS}
    outputs = {name for name in by_rank[0]["whole"] if name.startswith("output")}
    weights = {name for name in by_rank[0]["whole"] if "linear" in name}
    for name in ("skipped backward prefetch", "skipped reduce"):  # gradients alone
        assert all(apart[name][output] < 1e-12 for output in outputs), name
    assert any(apart["skipped backward prefetch"][key] > 1e-3 for key in ("x 0", "x 1"))
    assert all(apart["skipped reduce"][key] > 1e-3 for key in weights)
    for name in ("two slots swapped", "dropped wait"):
        assert any(apart[name][output] > 1e-3 for output in outputs), name


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
def test_steps_with_changed_plans_against_fp64(slots: int) -> None:
    """What `tests/gpu/test_redundant_gpu.py` does on GPUs."""
    check_steps(run_ranks(2, against_dense, replace(BF16, hidden=128, ffn=64), slots))


# ----------------------------------------------------------------------------------------------- variants of one layer


def checkpointed(layer: Any, x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "megatron":
        return checkpoint(lambda hidden: layer(hidden)[0], False, x)
    return torch_checkpoint(lambda hidden: layer(hidden)[0], x, use_reentrant=False)


# name -> (settings of install(), fields of the config, how it is recomputed, what token 1 then selects instead of 1)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, int | None]] = {
    "padded rows": ({"expert_alignment": 8}, {}, "", None),
    "deterministic": ({"deterministic": True}, {}, "", None),
    "activation recomputed": (
        {},
        {"moe_grouped_gemm": True, "recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
        "",
        None,
    ),
    "recomputed": ({}, {}, "megatron", None),
    "recomputed with a near tie": ({}, {}, "megatron", 4),
    "recomputed, routing not reused": ({"reuse_recompute_handle": False}, {}, "megatron", None),
    "torch's checkpoint": ({}, {}, "torch", None),
    "torch's checkpoint with a near tie on one rank": ({}, {}, "torch", 3),
}


def varied(group: Any) -> dict[str, Any]:
    """By variant: the largest differences to the same with R = 0, and how often was planned."""
    rank, found = group.rank(), {}
    with process_groups(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpandedManager, "_probs_in_fp32", lambda self: self.token_probs)
        plans: list[Any] = []
        theirs = planner.plan
        patch.setattr(planner, "plan", lambda *given: plans.append(theirs(*given)) or plans[-1])
        topk_idx = torch.tensor([[3, 5, 6] if token % 4 == 0 else [0, 1, 2] for token in range(40 - rank)])
        x, grad = inputs(EXACT, len(topk_idx))
        for name, (settings, fields, how, other) in VARIANTS.items():
            results, loads = [], []
            for slots in (0, 2):
                plans.clear()
                install("sequential", slots, **settings)
                layer = add_layer(EXACT, "sequential", topk_idx, **MORE[torch.float64], **fields)
                if other is not None:
                    layer.router.columns = torch.arange(EXACT.experts).repeat(len(topk_idx), 1)
                    layer.router.columns[1, [1, other]] = torch.tensor([other, 1])
                own = x.detach().requires_grad_()
                y = checkpointed(layer, own, how) if how else layer(own)[0]
                y.backward(grad)
                result = {"output": y.detach(), "x": own.grad}
                results.append(result | {key: p.grad for key, p in layer.named_parameters()})
                loads.append(megatron_ep_v2.megatron.expert_load.read()[0])
            found[name] = {
                "errors": {key: difference(results[1][key], value) for key, value in results[0].items()},
                "plans": len(plans),
                "replicas": [int((plan.experts >= 0).sum()) for plan in plans],
                "load": torch.equal(loads[0].tokens, loads[1].tokens),
                "overload": [load.overload.largest for load in loads],
            }
    return found


def test_padding_determinism_and_recompute() -> None:
    for found in run_ranks(2, varied):
        for name, of in found.items():
            assert worst(of["errors"].values()) < 1e-12, (name, of["errors"])
            assert of["replicas"] == [2] * of["plans"], name
            again = name == "recomputed, routing not reused" or name.startswith("torch")
            assert of["plans"] == (2 if again else 1), "a plan is kept with the handle that is replayed"
            assert of["load"], name
            # 79 tokens of 3 selections: 20 of [3, 5, 6] and 59 of [0, 1, 2] give rank 0 197 rows of 237.
            assert of["overload"] == pytest.approx([197 / 118.5, 119 / 118.5]), name


# ------------------------------------------------------------------------------------------- where gradients are added


def into(group: Any) -> dict[str, dict[str, float]]:
    """By kind of `main_grad`: the largest differences of what is in it after two micro-batches, to twice autograd's
    gradient with R = 0; and 0 if autograd was given a gradient each time, without which the stream of DDP's hook does
    not wait."""
    rank, found = group.rank(), {}
    topk_idx = torch.tensor([[3, 5, 6] if token % 4 == 0 else [0, 1, 2] for token in range(40 - rank)])
    shape = replace(CPU, hidden=16, ffn=8)
    x, grad = inputs(shape, len(topk_idx))
    with process_groups():
        layer = build(shape, "grouped", topk_idx, 0)
        wanted = step(layer, x, grad)
        for fused in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                for overwrite in (False, True):
                    layer = build(shape, "grouped", topk_idx, 2)
                    collected, nodes, given = {}, [], list[Any]()
                    for name, linear in (("fc1", layer.experts.linear_fc1), ("fc2", layer.experts.linear_fc2)):
                        linear.fuse_wgrad_accumulation = fused
                        # To be replaced, so it may be anything.
                        start = torch.full(linear.weight.shape, 100.0 if overwrite else 0.0, dtype=dtype)
                        collect_gradient(linear.weight, start)
                        nodes.append(linear.weight.expand_as(linear.weight).grad_fn.next_functions[0][0])
                        nodes[-1].register_prehook(given.extend)
                        linear.weight.overwrite_main_grad = overwrite
                        collected[f"experts.linear_{name}.weight"] = start
                    for y in [layer(x)[0] for _ in range(2)]:  # both in flight, as in a pipeline
                        y.backward(grad)
                    errors = {name: difference(g.float(), 2 * wanted[name]) for name, g in collected.items()}
                    errors["given"] = float(len(given) != 4 or any(gradient is None for gradient in given))
                    found[f"fused={fused}, {dtype}, overwrite={overwrite}"] = errors
    return found


def test_what_comes_home_is_added_once_wherever_gradients_are_kept() -> None:
    """With `main_grad` as in DDP and in the example's trainer, which the first micro-batch replaces or not."""
    for found in run_ranks(2, into):
        assert len(found) == 8
        for name, errors in found.items():
            for linear, error in errors.items():
                assert error < (2e-2 if "bfloat16" in name else 1e-5), (name, linear, error)


def failed(group: Any) -> dict[str, list[bool]]:
    """By what has failed on all ranks in a backward, after replicas' gradients had begun their way home: of each
    transfer, whether it was waited for."""
    topk_idx = torch.tensor([[3, 5, 6] if token % 4 == 0 else [0, 1, 2] for token in range(40 - group.rank())])
    shape = replace(CPU, hidden=16, ffn=8)
    x, grad = inputs(shape, len(topk_idx))
    theirs, found = ReferenceBuffer.reduce_grads, {}

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    with process_groups():
        for name in ("wgrad", "dgrad"):
            transfers: list[Any] = []

            def noting(self: Any, *arguments: Any, transfers: list[Any] = transfers) -> Any:
                transfers.append(theirs(self, *arguments))
                return transfers[-1]

            layer = build(shape, "sequential", topk_idx, 2)
            y = layer(x)[0]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ReferenceBuffer, "reduce_grads", noting)
                patch.setattr(type(GEMMS["sequential"]), name, fail)
                with pytest.raises(torch.OutOfMemoryError):
                    y.backward(grad)
            found[name] = [not transfer._works for transfer in transfers]
    return found


def test_a_transfer_home_is_waited_for_after_an_error_in_the_backward() -> None:
    """DeepEP would add to `main_grad` while it is zeroed for the next step, or after it."""
    assert run_ranks(2, failed) == [{"wgrad": [True], "dgrad": [True]}] * 2


def unaligned(group: Any) -> tuple[float, list[int]]:
    """The largest difference of a `main_grad` in the middle of a buffer to autograd's gradient; and where, modulo 16,
    DeepEP would have added."""
    topk_idx = torch.tensor([[3, 5, 6] if token % 4 == 0 else [0, 1, 2] for token in range(40 - group.rank())])
    shape = replace(CPU, hidden=16, ffn=8)
    x, grad = inputs(shape, len(topk_idx))
    offsets, theirs = [], ReferenceBuffer.reduce_grads

    def noting(self: Any, slot_grads: torch.Tensor, grads: torch.Tensor, mapping: torch.Tensor) -> Any:
        offsets.append(grads.data_ptr() % 16)
        return theirs(self, slot_grads, grads, mapping)

    with process_groups(), pytest.MonkeyPatch.context() as patch:
        wanted = step(build(shape, "grouped", topk_idx, 0), x, grad)
        patch.setattr(ReferenceBuffer, "reduce_grads", noting)
        layer = build(shape, "grouped", topk_idx, 2)
        weight = layer.experts.linear_fc1.weight
        main_grad = torch.zeros(weight.numel() + 1)[1:].view(weight.shape)
        collect_gradient(weight, main_grad)
        layer(x)[0].backward(grad)
    return difference(main_grad, wanted["experts.linear_fc1.weight"]), offsets


def test_a_main_grad_that_is_not_aligned_is_not_given_to_the_kernel() -> None:
    """As in Megatron's DDP without the distributed optimizer, where a parameter of odd size comes before."""
    for error, offsets in run_ranks(2, unaligned):
        assert error < 1e-5 and offsets == [0, 0]


def evaluated_first(group: Any) -> float:
    """The largest difference of a step after an evaluation in inference mode, which has built the buffer, to R = 0."""
    topk_idx = torch.tensor([[3, 5, 6] if token % 4 == 0 else [0, 1, 2] for token in range(40 - group.rank())])
    shape = replace(CPU, hidden=16, ffn=8)
    x, grad = inputs(shape, len(topk_idx))
    with process_groups():
        wanted = step(build(shape, "grouped", topk_idx, 0), x, grad)
        layer = build(shape, "grouped", topk_idx, 2)
        with torch.inference_mode():
            layer(x)
        found = step(layer, x, grad)
    return worst(difference(found[name], value) for name, value in wanted.items())


def test_training_after_an_evaluation_in_inference_mode() -> None:
    assert worst(run_ranks(2, evaluated_first)) < 1e-5


def buffer_left(group: Any) -> bool:
    """Whether the buffer with its slots is alive after a step with replicas, once it is destroyed."""
    topk_idx = torch.tensor([[0, 1, 2]] * 9)
    with process_groups():
        install("sequential", 1)
        layer = add_layer(CPU, "sequential", topk_idx)
        with watched() as seen:
            step(layer, *inputs(CPU, 9))
        assert "reduce_grads" in seen.calls
        buffer = weakref.ref(pool.buffers()[0])
        megatron_ep_v2.destroy_buffers()
        gc.collect()
        return buffer() is not None


def test_a_layer_keeps_no_buffer_between_steps() -> None:
    """It would keep the slots' memory after `destroy_buffers()`, and a copy of the layer would copy the buffer."""
    assert run_ranks(2, buffer_left) == [False] * 2


def logged(group: Any) -> list[list[str]]:
    """Kinds of a step's calls in the watchdog's record, and what is there after a refused transfer."""
    topk_idx = torch.tensor([[0, 1, 2]] * 9)
    with process_groups():
        install("sequential", 1, watchdog_secs=600)
        step(add_layer(CPU, "sequential", topk_idx), *inputs(CPU, 9))
        (buffer,) = pool.buffers()
        record = buffer.watch.call_log  # type: ignore[attr-defined]

        def kinds() -> list[str]:
            calls = [record.call(number) for number in range(1, record.cells[ENTERED] + 1)]
            return [CALLS[kind] for _, kind, *_ in calls]

        before = kinds()
        mapping = torch.tensor([[0], [0]], dtype=torch.int32)  # rank 0's own
        refused = attempt(lambda: buffer.prefetch_weights(buffer.slots(), [], mapping))  # type: ignore[attr-defined]
        assert refused is not None and record.pending() == 0
        return [before, kinds()]


def test_the_watchdog_knows_the_transfers() -> None:
    calls = [
        *("forward dispatch", "transfer of redundant experts' weights", "forward combine", "backward of the combine"),
        *("transfer of redundant experts' gradients", "transfer of redundant experts' gradients"),
        "backward of the dispatch",
    ]
    assert run_ranks(2, logged) == [[calls, calls]] * 2
