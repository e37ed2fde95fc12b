"""SwiGLU experts against fp64 on every backend, with unowned rows that hold NaN; and what the backends refuse."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from megatron_ep_v2.errors import EPError, InputError, SettingsError, UnavailableError
from megatron_ep_v2.experts import gemm as gemms
from megatron_ep_v2.experts.gemm import DeepGemm, Grouped
from megatron_ep_v2.experts.groups import Groups
from megatron_ep_v2.experts.mlp import swiglu_experts
from tests.helpers.expert_rows import NAN, SIZES, check, expected, expert_rows, gradcheck_inputs, run, with_tail

BACKENDS = ["sequential", "grouped", "deepgemm"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def by_m_indices(calls: list[str], name: str, transpose: bool) -> Any:
    """DeepGEMM's call on a CPU: each row by its index; a block of 64 that starts with -1 is left as it was."""

    def multiply(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, grouped_layout: torch.Tensor) -> None:
        calls.append(name)
        assert grouped_layout.dtype == torch.int32 and grouped_layout.shape == (len(a),) and len(a) % 128 == 0
        assert a.is_contiguous() and d.is_contiguous()
        d.fill_(NAN)
        for start in range(0, len(a), 64):
            experts = grouped_layout[start : start + 64].unique().tolist()
            assert len(set(experts) - {-1}) <= 1, "a block of rows has one expert"
            if grouped_layout[start] >= 0:
                weight = b[grouped_layout[start]]
                d[start : start + 64] = a[start : start + 64] @ (weight.T if transpose else weight)

    return multiply


@pytest.fixture(autouse=True)
def deep_gemm_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the package, with the two calls that are used, and NaN where it writes nothing."""
    calls: list[str] = []
    fake = types.SimpleNamespace(
        m_grouped_bf16_gemm_nt_contiguous=by_m_indices(calls, "nt", True),
        m_grouped_bf16_gemm_nn_contiguous=by_m_indices(calls, "nn", False),
    )

    class OnCpu(DeepGemm):
        def require(self, device: torch.device) -> None:
            """Not here: it wants a GPU."""

        def check(self, x: torch.Tensor, w: torch.Tensor) -> None:
            Grouped.check(self, x, w)

    monkeypatch.setattr(gemms, "deep_gemm", lambda: fake)
    monkeypatch.setitem(gemms.GEMMS, "deepgemm", OnCpu())
    return calls


@each_backend
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
def test_against_fp64(backend: str, sizes: str, kind: torch.dtype, deep_gemm_calls: list[str]) -> None:
    b = expert_rows(SIZES[sizes])
    groups = Groups.from_counts(torch.tensor(b.sizes, dtype=kind), b.x)
    check(run(swiglu_experts, b, groups, backend), expected(b), 1e-6)
    assert deep_gemm_calls == (["nt", "nt", "nn", "nn"] if backend == "deepgemm" else [])


@each_backend
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("num_rows", "alignment"), [(60, 4), (640, 128)])
def test_unowned_rows_reach_nothing(backend: str, sizes: str, num_rows: int, alignment: int) -> None:
    """With the counts on the device alone: static rows, NaN after the last expert, in the incoming gradient, too."""
    b = expert_rows(SIZES[sizes])
    moved, groups, slots = with_tail(b, num_rows, alignment)
    assert groups.sizes is None and groups.used is not None
    ours = run(swiglu_experts, moved, groups, backend)
    for name in ("output", "x", "probs"):
        rest = torch.ones(num_rows, dtype=torch.bool)
        rest[slots] = False
        if name == "probs":  # padding between experts is a row like others, of zeros
            rest[: int(groups.used)] = False
        assert not ours[name][rest].any(), f"{name}: unowned rows are zero"
        ours[name] = ours[name][slots]
    check(ours, expected(b), 1e-6)


def test_aligned_rows_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_ep_v2.experts.mlp as mlp

    monkeypatch.setattr(mlp, "_padded", None)
    b = expert_rows([128, 0, 256, 0])
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    assert groups.alignment == 128
    check(run(swiglu_experts, b, groups, "deepgemm"), expected(b), 1e-6)


@pytest.mark.parametrize("tail", [False, True])
def test_gradients_by_differences(tail: bool) -> None:
    inputs, groups = gradcheck_inputs(tail)
    assert torch.autograd.gradcheck(lambda *args: swiglu_experts(*args, groups, "sequential"), inputs)


@each_backend
def test_bf16(backend: str) -> None:
    b = expert_rows([40, 3, 0, 21], hidden=64, ffn=32, dtype=torch.bfloat16)
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    check(run(swiglu_experts, b, groups, backend), expected(b), 1e-2)


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    b = expert_rows([3, 4])
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    x = b.x.requires_grad_()
    swiglu_experts(x, b.probs, b.w1, b.w2, groups, "grouped").backward(b.grad)
    assert x.grad is not None and b.w1.grad is None
    w1 = b.w1.requires_grad_()
    swiglu_experts(x.detach(), b.probs, w1, b.w2, groups, "grouped").backward(b.grad)
    assert w1.grad is not None


@pytest.mark.parametrize("backend", ["sequential", "grouped"])
def test_a_gradient_of_a_gradient_is_refused(backend: str) -> None:
    """The kernels' outputs on GPUs carry no graph, so it would be wrong there in silence."""
    b = expert_rows([3, 4])
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    x = b.x.requires_grad_()
    y = swiglu_experts(x, b.probs, b.w1, b.w2, groups, backend)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(EPError, match="gradient of a gradient"):
        grad.sum().backward()


def test_rows_and_weights_of_two_dtypes_are_refused() -> None:
    b = expert_rows([3, 4])
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    for backend in ("sequential", "grouped"):
        with pytest.raises(InputError, match="float64 rows"):
            swiglu_experts(b.x.double(), b.probs, b.w1, b.w2, groups, backend)


def test_what_is_refused() -> None:
    b = expert_rows([3, 4])
    counts = torch.tensor(b.sizes)
    with pytest.raises(InputError, match="not as many as their counts say"):
        Groups.from_counts(counts + 1, b.x)
    groups = Groups.from_counts(counts, b.x)
    with pytest.raises(SettingsError, match="no 'fast' experts"):
        swiglu_experts(b.x, b.probs, b.w1, b.w2, groups, "fast")
    with pytest.raises(InputError, match="not the rows and weights"):
        swiglu_experts(b.x, b.probs, b.w2, b.w1, groups, "grouped")
    with pytest.raises(InputError, match="grouped GEMM does not take"):
        swiglu_experts(b.x.double(), b.probs, b.w1.double(), b.w2.double(), groups, "grouped")
    odd = expert_rows([3, 4], hidden=6)
    with pytest.raises(InputError, match="multiples of 4"):
        swiglu_experts(odd.x, odd.probs, odd.w1, odd.w2, groups, "grouped")


def test_deepgemm_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    b = expert_rows([3, 4])
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    with pytest.raises(UnavailableError, match="DeepGEMM cannot be imported") as raised:
        swiglu_experts(b.x, b.probs, b.w1, b.w2, groups, "deepgemm")
    assert "choose the grouped experts" in str(raised.value)
    monkeypatch.setattr(gemms, "deep_gemm", lambda: None)
    with pytest.raises(UnavailableError, match="multiplies on GPUs only"):
        swiglu_experts(b.x, b.probs, b.w1, b.w2, groups, "deepgemm")


def test_a_torch_without_a_grouped_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    monkeypatch.setattr(gemms, "_grouped_mm", gemms._grouped_mm.__wrapped__)
    b = expert_rows([3, 4])
    groups = Groups.from_counts(torch.tensor(b.sizes), b.x)
    check(run(swiglu_experts, b, groups, "grouped"), expected(b), 1e-6)  # torch 2.8 and 2.9 have it under this name
    monkeypatch.delattr(torch, "_grouped_mm")
    with pytest.raises(UnavailableError, match="no grouped GEMM"):
        swiglu_experts(b.x, b.probs, b.w1, b.w2, groups, "grouped")
