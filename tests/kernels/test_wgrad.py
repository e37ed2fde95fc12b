"""Weight gradients that are added to a buffer: the PyTorch reference against fp64, the Triton kernel against that as
far as a CPU goes, and what Megatron's DDP finds after a backward that used them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ep_v2.errors import InputError
from megatron_ep_v2.experts.gemm import GEMMS
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import Weights, linear, run_delayed, run_experts
from megatron_ep_v2.kernels import wgrad
from megatron_ep_v2.megatron.qwen3_moe.optimizer import collect_gradient
from tests.helpers.compare import relative_error
from tests.helpers.expert_rows import NAN, expert_rows, gradcheck_inputs, with_tail
from tests.helpers.interpreter import child, needs_triton

ROWS = [3, 0, 300, 1, 0]  # of each expert
TAIL = 7  # unowned rows after them
FLOATS = (torch.bfloat16, torch.float32, torch.float64)
EDGES = [(16, 8), (130, 72), (64, 200), (129, 257)]  # N, K


def case(
    n: int, k: int, rows: torch.dtype, buffer: torch.dtype, sizes: list[int] = ROWS, largest: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, grad, x, ends. Whole numbers, so that every order of adding up gives the same in fp32 and another in bf16;
    NaN in the unowned rows."""
    generator = torch.Generator().manual_seed(n + k)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=generator).double()

    grad, x = whole(sum(sizes) + TAIL, n), whole(sum(sizes) + TAIL, k)
    grad[sum(sizes) :], x[sum(sizes) :] = NAN, NAN
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return whole(len(sizes), n, k).to(buffer), grad.to(rows), x.to(rows), ends


def exact(out: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """In fp64, expert by expert."""
    total, start = out.double().clone(), 0
    for expert, end in enumerate(ends.tolist()):
        total[expert] += torch.einsum("rn,rk->nk", grad[start:end].double(), x[start:end].double())
        start = end
    return total


# ---------------------------------------------------------------------------------------------- reference against fp64


@pytest.mark.parametrize("rows", FLOATS, ids=str)
@pytest.mark.parametrize("buffer", FLOATS, ids=str)
def test_sums_are_exact_and_rounded_once(rows: torch.dtype, buffer: torch.dtype) -> None:
    out, grad, x, ends = case(24, 16, rows, buffer)
    wanted = exact(out, grad, x, ends)
    assert wanted.abs().max() > 600, "bf16 cannot add that up by itself"
    before = out.clone()
    wgrad.add_(out, grad, x, ends)
    assert out.dtype == buffer and torch.equal(out, wanted.to(buffer)) and not torch.equal(out, before)
    wgrad.add_(out, grad, x, ends)
    assert torch.equal(out, exact(wanted.to(buffer), grad, x, ends).to(buffer)), "a second time it adds to the first"


@pytest.mark.parametrize(("kind", "most"), [(torch.bfloat16, 2e-6), (torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_fractions(kind: torch.dtype, most: float) -> None:
    generator = torch.Generator().manual_seed(1)
    out, grad, x = (torch.randn(shape, generator=generator) for shape in ((3, 24, 16), (90, 24), (90, 16)))
    out, grad, x = out.to(torch.promote_types(kind, torch.float32)), grad.to(kind), x.to(kind)
    ends = torch.tensor([40, 40, 90], dtype=torch.int32)
    wanted = exact(out, grad, x, ends)
    wgrad.add_(out, grad, x, ends)
    assert relative_error(out, wanted) <= most


@pytest.mark.parametrize("sizes", [ROWS, [0, 0, 0, 0, 0]], ids=str)
def test_an_expert_without_rows_is_left_alone_bit_for_bit(sizes: list[int]) -> None:
    """Negative zeros and NaN in its part stay what they are: not even zero is added."""
    out, grad, x, ends = case(8, 16, torch.bfloat16, torch.float32, sizes)
    idle = [expert for expert, size in enumerate(sizes) if not size]
    out[idle] = torch.tensor([-0.0, NAN, torch.inf, 1e-45]).repeat(32).view(8, 16)
    before = out.clone().view(torch.int32)
    wgrad.add_(out, grad, x, ends)
    assert torch.equal(out.view(torch.int32)[idle], before[idle])
    busy = [expert for expert, size in enumerate(sizes) if size]
    assert out[busy].isfinite().all(), "rows past the last end hold NaN and reach nothing"
    assert all(not torch.equal(out.view(torch.int32)[expert], before[expert]) for expert in busy)


@pytest.mark.parametrize("rows", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", [ROWS, [0, 0, 0, 0, 0]], ids=str)
def test_a_buffer_that_is_overwritten_is_not_read(rows: torch.dtype, sizes: list[int]) -> None:
    """Nor do experts without rows keep what was there: they get zeros."""
    out, grad, x, ends = case(24, 16, rows, torch.float32, sizes)
    wanted = exact(torch.zeros_like(out), grad, x, ends)
    out.fill_(NAN)
    wgrad.add_(out, grad, x, ends, overwrite=True)
    assert torch.equal(out, wanted.float())


@pytest.mark.parametrize("shape", [(4, 24, 16), (6, 24, 16), (5, 16, 24), (5, 24, 8), (5, 24 * 16)], ids=str)
def test_a_buffer_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    _, grad, x, ends = case(24, 16, torch.float32, torch.float32)
    out = torch.zeros(shape)
    with pytest.raises(InputError, match="do not fit the buffer") as raised:
        wgrad.add_(out, grad, x, ends)
    assert str(shape) in str(raised.value) and "(5, 24, 16), contiguous" in str(raised.value)
    assert "--no-gradient-accumulation-fusion" in str(raised.value) and not out.any()


def test_a_buffer_that_is_not_contiguous_is_refused() -> None:
    _, grad, x, ends = case(24, 16, torch.float32, torch.float32)
    with pytest.raises(InputError, match="do not fit the buffer") as raised:
        wgrad.add_(torch.zeros(5, 16, 24).transpose(1, 2), grad, x, ends)
    assert "strides (384, 1, 24)" in str(raised.value)


# ----------------------------------------------------------------------------------------------------- Triton, on a CPU

INTERPRET = """
import itertools, json, torch
from tests.kernels.test_wgrad import EDGES, ROWS, case
from megatron_ep_v2.kernels import wgrad as reference, wgrad_triton as kernels

wrong, done = [], 0
# Triton's interpreter keeps bf16 in uint16, which its tl.dot multiplies: fp16 stands for it, in tiles of the same size.
# And it cuts off where a GPU rounds to bf16: sums that bf16 holds need neither.
kinds = [(torch.float16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float32)]
for (n, k), (rows, buffer), sizes in itertools.product(EDGES, kinds, (ROWS, [0] * 5, [64, 65, 0, 31, 128])):
    out, grad, x, ends = case(n, k, rows, buffer, sizes, 1 if buffer == torch.bfloat16 else 8)
    out[[expert for expert, size in enumerate(sizes) if not size]] = -0.0  # the sign of which an addition takes away
    theirs = out.clone()
    kernels.add_(out, grad, x, ends, False)
    reference.add_(theirs, grad, x, ends)
    done += 1
    if not torch.equal(out.view(torch.uint8), theirs.view(torch.uint8)):
        wrong.append([n, k, str(rows), str(buffer), sizes])
    for each, target in ((kernels, out), (reference, theirs)):
        each.add_(target.fill_(float("nan")), grad, x, ends, True)
    if not torch.equal(out, theirs):
        wrong.append(["overwritten", n, k, str(rows), str(buffer), sizes])
kernels.add_(torch.empty(5, 0, 8), torch.empty(9, 0), torch.empty(9, 8), torch.zeros(5, dtype=torch.int32), False)
print(json.dumps({"wrong": wrong, "done": done}))
"""


@pytest.mark.slow
@needs_triton
def test_the_kernel_equals_the_reference_in_tritons_interpreter() -> None:
    """Sizes that are no multiples of a tile, NaN in unowned rows, bits of idle experts that an addition changes."""
    assert child(INTERPRET, TRITON_INTERPRET="1") == {"wrong": [], "done": len(EDGES) * 3 * 3}


COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_ep_v2.kernels import wgrad_triton as kernels

found = {}
for out, overwrite in (("*fp32", False), ("*bf16", False), ("*fp32", True)):
    kinds = [out, "*bf16", "*bf16", "*i32", *["constexpr"] * 6]
    signature = dict(zip(kernels._add.arg_names, kinds, strict=True))
    numbers = (1536, 2048, kernels.TILE_N, kernels.TILE_K, kernels.ROWS, overwrite)
    constants = dict(zip(kernels._add.arg_names[4:], numbers))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(kernels._add, signature, constants, aligned)
    options = {"num_warps": kernels.WARPS, "num_stages": kernels.STAGES}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    names = re.findall(r"wgmma\\.mma_async\\S*|cp\\.async\\.c[ga]\\S*|st\\.global\\S*", ptx)
    found[f"{out}, {overwrite}"] = sorted(set(names))
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_triton
def test_the_kernel_compiles_for_tensor_cores_that_add_up_in_fp32(tmp_path: Path) -> None:
    found = child(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 3
    for out, instructions in found.items():
        multiply = [name for name in instructions if name.startswith("wgmma")]
        assert multiply and all(name.endswith(".f32.bf16.bf16") for name in multiply), f"{out}: {instructions}"
        assert any(name.startswith("cp.async") for name in instructions), f"{out}: rows are not fetched ahead"
        assert any(name.startswith("st.global.v4") for name in instructions), f"{out}: not 16 bytes at a time"


# ------------------------------------------------------------------------------------------ in backward, as DDP sees it


def from_a_node(x: torch.Tensor, seen: list[Any]) -> torch.Tensor:
    """Rows that have been received: note when their backward runs."""
    rows = x * 1
    assert rows.grad_fn is not None
    rows.grad_fn.register_hook(lambda *_: seen.append("rows"))
    return rows


def after(groups: Groups, rows: torch.Tensor) -> Groups:
    """With weight gradients after the backward of the rows' node."""
    assert rows.grad_fn is not None
    return dataclasses.replace(groups, rows_node=rows.grad_fn._sequence_nr())


def megatrons_hook(weight: torch.Tensor, seen: list[Any]) -> Any:
    """Do after the gradient of a parameter what Megatron's DDP does, and note on what. Keep the node that this gives:
    with it, autograd forgets the hook."""
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    def hook(*_: Any) -> None:
        grad = weight.grad
        assert grad is not None, "Megatron: 'param.grad being None is not safe when overlap_grad_reduce is True'"
        seen.append(
            {
                "shape": tuple(grad.shape),
                "zero": not grad.to_dense().any(),
                "elements": grad._values().numel(),
                "added": weight.grad_added_to_main_grad,  # type: ignore[attr-defined]
            }
        )
        if not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False):  # type: ignore[attr-defined]
            weight.main_grad.add_(grad)  # type: ignore[attr-defined]
        weight.grad = None

    node.register_hook(hook)
    return node


@pytest.mark.parametrize("backend", ["sequential", "grouped"])
@pytest.mark.parametrize("zero_out", [False, True])
@pytest.mark.parametrize("buffer", [torch.float32, None], ids=["fp32", "the weights' own"])
@pytest.mark.parametrize("when", ["at once", "after the rows", "delayed"])
def test_two_micro_batches_are_in_main_grad(
    backend: str, zero_out: bool, buffer: torch.dtype | None, when: str
) -> None:
    b = expert_rows([3, 0, 5, 1], dtype=torch.bfloat16)
    weight = torch.nn.Parameter(b.w1.clone())
    started = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).to(buffer or weight.dtype)
    weight.main_grad = started.clone()  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    weight.zero_out_wgrad = zero_out  # type: ignore[attr-defined]
    seen: list[Any] = []
    node = megatrons_hook(weight, seen)
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    wanted, grad_x = started.double(), []
    for micro_batch in (1, 2):
        x = (b.x * micro_batch).requires_grad_()
        rows = from_a_node(x, seen)
        grad = torch.ones(len(x), weight.shape[1], dtype=x.dtype)
        groups = after(groups, rows) if when == "after the rows" else groups
        delayed: list[torch.Tensor] | None = [] if when == "delayed" else None
        main_grad: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]
        linear(rows, weight, groups, GEMMS[backend], True, None, main_grad, delayed).backward(grad)
        if delayed is not None:
            assert seen[-1] == "rows"
            run_delayed(delayed)
        wanted = exact(wanted.to(started.dtype), grad, x.detach(), groups.ends)
        grad_x.append(x.grad)
    tolerance = 1e-6 if buffer else 2.0**-8
    assert relative_error(weight.main_grad, wanted) <= tolerance  # type: ignore[attr-defined]
    assert (wanted - started.double()).norm() > 1
    assert torch.equal(weight.main_grad[1], started[1]), "the expert without rows"  # type: ignore[attr-defined]
    expected = {"shape": tuple(weight.shape), "zero": True, "elements": 0, "added": True}
    assert seen == 2 * ([expected, "rows"] if when == "at once" else ["rows", expected])
    assert weight.grad is None and node is not None
    plain = b.x.clone().requires_grad_()
    linear(plain, weight.detach(), groups, GEMMS[backend], True).backward(grad)
    assert torch.equal(grad_x[0], plain.grad), "the rows' gradient is that of a backward without a buffer"


@pytest.mark.parametrize("when", ["at once", "after the rows", "delayed"])
def test_of_two_micro_batches_in_flight_only_the_first_gradient_replaces_what_is_there(when: str) -> None:
    b = expert_rows([3, 0, 5, 1])
    weight, into = torch.nn.Parameter(b.w1.clone()), torch.full_like(b.w1, NAN)
    collect_gradient(weight, into)
    weight.overwrite_main_grad = True  # type: ignore[attr-defined]
    outputs, delayed = list[torch.Tensor](), list[torch.Tensor]()
    for micro_batch in (1, 2):
        rows = from_a_node((b.x * micro_batch).requires_grad_(), [])
        groups = Groups.from_counts(torch.tensor(b.sizes), rows)
        groups = after(groups, rows) if when == "after the rows" else groups
        leave = delayed if when == "delayed" else None
        outputs.append(linear(rows, weight, groups, GEMMS["grouped"], True, None, into, leave))
    for y in outputs:
        y.backward(torch.ones_like(y))
        run_delayed(delayed)
    wanted = exact(torch.zeros_like(weight), torch.ones_like(outputs[0]), 3 * b.x, groups.ends)
    assert relative_error(into, wanted) <= 1e-6


@pytest.mark.parametrize("when", ["at once", "after the rows", "delayed"])
def test_the_stream_of_ddps_hook_is_made_to_wait(when: str) -> None:
    """DDP's hook starts a reduction in the stream in which DDP was built. Autograd makes that wait for the stream in
    which the gradient was added to `main_grad` only if it is given a gradient."""
    b, delayed = expert_rows([3, 4]), list[torch.Tensor]()
    weight, given = torch.nn.Parameter(b.w1.clone()), list[Any]()
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    node.register_prehook(given.extend)
    groups, rows = Groups.from_counts(torch.tensor(b.sizes), b.x), from_a_node(b.x.requires_grad_(), [])
    groups = after(groups, rows) if when == "after the rows" else groups
    main_grad = torch.zeros_like(weight).detach()
    y = linear(rows, weight, groups, GEMMS["sequential"], True, None, main_grad, delayed if when == "delayed" else None)
    y.backward(torch.ones_like(y))
    run_delayed(delayed)
    assert len(given) == 1 and given[0] is not None and main_grad.any()


def test_a_graph_of_the_backward_may_be_recorded() -> None:
    """`create_graph=True`, without a gradient of the gradient."""
    b = expert_rows([3, 4])
    weight, main_grad = torch.nn.Parameter(b.w1.clone()), torch.zeros_like(b.w1)
    groups, x = Groups.from_counts(torch.tensor(b.sizes), b.x), b.x.requires_grad_()
    y = linear(x, weight, groups, GEMMS["sequential"], True, None, main_grad)
    grads = torch.autograd.grad(y, (x, weight), torch.ones_like(y), create_graph=True)
    assert grads[0].requires_grad and not grads[1].to_dense().any() and main_grad.any()


def test_a_gradient_that_is_there_already_stays() -> None:
    """Without DDP's hook it is not taken away; Megatron's own linears leave it, too."""
    b = expert_rows([3, 4])
    weight = torch.nn.Parameter(b.w1.clone())
    weight.grad = torch.full_like(weight, 3.0)
    groups, main_grad = Groups.from_counts(torch.tensor(b.sizes), b.x), torch.zeros_like(weight)
    y = linear(b.x, weight, groups, GEMMS["sequential"], True, None, main_grad.detach())
    y.backward(torch.ones_like(y))
    assert (weight.grad == 3).all() and weight.grad_added_to_main_grad is True  # type: ignore[attr-defined]


@pytest.mark.parametrize("when", ["at once", "after the rows", "delayed"])
def test_without_a_buffer_autograd_gets_the_gradient(when: str) -> None:
    b, seen = expert_rows([3, 4]), list[str]()
    weight = torch.nn.Parameter(b.w1.clone())
    weight.register_post_accumulate_grad_hook(lambda _: seen.append("weight"))
    groups, rows = Groups.from_counts(torch.tensor(b.sizes), b.x), from_a_node(b.x.requires_grad_(), seen)
    groups = after(groups, rows) if when == "after the rows" else groups
    delayed = list[torch.Tensor]()
    y = linear(rows, weight, groups, GEMMS["sequential"], True, delayed=delayed if when == "delayed" else None)
    y.backward(torch.ones_like(y))
    assert len(delayed) == (when == "delayed") and (weight.grad is None) == (when == "delayed")
    run_delayed(delayed)
    assert not delayed and seen == (["weight", "rows"] if when == "at once" else ["rows", "weight"])
    wanted = exact(torch.zeros_like(weight), torch.ones_like(y), b.x, groups.ends)
    assert weight.grad is not None and relative_error(weight.grad, wanted) <= 1e-6
    assert not hasattr(weight, "grad_added_to_main_grad")


def test_a_second_backward_before_the_delayed_gradients_is_refused() -> None:
    """The gradients of the first would be lost."""
    b, delayed = expert_rows([3, 4]), list[torch.Tensor]()
    weight = torch.nn.Parameter(b.w1.clone())
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    y = linear(b.x.requires_grad_(), weight, groups, GEMMS["sequential"], True, delayed=delayed)
    y.backward(torch.ones_like(y), retain_graph=True)
    with pytest.raises(InputError, match="a second backward"):
        y.backward(torch.ones_like(y))


# ----------------------------------------------------------------------------------------------- activation recomputed


def through(inputs: list[torch.Tensor], groups: Groups, backend: str, recompute: bool) -> torch.Tensor:
    x, probs, w1, w2 = inputs
    return run_experts(x, probs, Weights(w1), Weights(w2), groups, backend, recompute)


@pytest.mark.parametrize("tail", [False, True])
def test_a_recomputed_activation_by_differences(tail: bool) -> None:
    inputs, groups = gradcheck_inputs(tail)
    assert torch.autograd.gradcheck(lambda *args: through(list(args), groups, "sequential", True), inputs)


@pytest.mark.parametrize(("backend", "tail"), [*itertools.product(["sequential", "grouped"], [False, True])])
def test_a_recomputed_activation_gives_the_same_gradients(backend: str, tail: bool) -> None:
    b = expert_rows([3, 0, 5, 1])
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    if tail:
        b, groups, _ = with_tail(b, 24, 4)
    found = []
    for recompute, later in ((False, False), (True, False), (True, True)):
        inputs = [t.detach().clone().requires_grad_() for t in (b.x, b.probs, b.w1, b.w2)]
        rows = inputs[0] * 1
        y = through([rows, *inputs[1:]], after(groups, rows) if later else groups, backend, recompute)
        y.backward(b.grad)
        found.append([y.detach(), *(t.grad for t in inputs)])
    for kept, *recomputed in zip(*found, strict=True):
        assert all(torch.equal(kept, each) for each in recomputed) and kept.isfinite().all()
    assert all(t.any() for t in found[0])
