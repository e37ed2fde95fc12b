"""A token's experts out of dense probabilities: the kernels in Triton's interpreter, and compiled for a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_ep_v2.errors import EPError
from megatron_ep_v2.kernels import topk as module
from megatron_ep_v2.kernels.topk import top_k
from tests.helpers.interpreter import child, needs_triton
from tests.helpers.topk_kernels import cases, selected_by_sort


def test_on_a_cpu_it_is_pytorchs() -> None:
    for name, probs, topk in cases():
        leaf = probs.clone().requires_grad_()
        values, indices = top_k(leaf, topk)
        expected = probs.gather(1, selected_by_sort(probs, topk))
        assert values.detach().sort(1).values.allclose(expected.sort(1).values, rtol=0, atol=0, equal_nan=True), name
        assert indices.dtype == torch.int64 and (indices < 0).equal(values == 0), name
        selected = indices >= 0
        (values * selected).nansum().backward()  # dispatch gives no gradient either to what was not selected
        assert leaf.grad is not None
        if not probs.isnan().any():
            rows = torch.arange(len(probs))[:, None].expand_as(indices)
            wanted = torch.zeros_like(probs)
            wanted[rows[selected], indices[selected]] = 1.0
            assert leaf.grad.equal(wanted), name
            assert probs[rows[selected], indices[selected]].equal(values[selected]), name


def test_the_kernels_gradient_by_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch for the kernels."""
    kernels = SimpleNamespace(
        select=lambda probs, topk: torch.topk(probs, topk),
        spread=lambda grad, indices, experts: grad.new_zeros(len(grad), experts).scatter(1, indices, grad),
    )
    monkeypatch.setattr(module, "_kernels", lambda: kernels)
    monkeypatch.setattr(module, "_suits_kernels", lambda probs, topk: True)
    probs = torch.rand(20, 16, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: top_k(x, 3)[0] ** 2, probs)
    values, indices = top_k(probs, 3)
    assert not indices.requires_grad
    (grad,) = torch.autograd.grad((values**2).sum(), probs, create_graph=True)
    with pytest.raises(EPError, match="gradient of a gradient"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "experts", "topk", "device", "suits"),
    [
        (torch.float32, 256, 8, "cuda", True),
        (torch.float32, 256, 17, "cuda", False),
        (torch.float32, 128, 8, "cuda", False),
        (torch.float64, 256, 8, "cuda", False),
        (torch.bfloat16, 256, 8, "cuda", False),
        (torch.float32, 256, 8, "cpu", False),
    ],
)
def test_which_probabilities_the_kernels_take(
    dtype: torch.dtype, experts: int, topk: int, device: str, suits: bool
) -> None:
    probs = SimpleNamespace(is_cuda=device == "cuda", dtype=dtype, numel=lambda: 4096 * experts, shape=(4096, experts))
    assert module._suits_kernels(probs, topk) is suits  # type: ignore[arg-type]


OLD = """
import json, logging
import triton.language as tl

del tl.gather
records = []
handler = logging.Handler()
handler.emit = lambda record: records.append(record.getMessage())
logging.getLogger().addHandler(handler)
from megatron_ep_v2.kernels import topk
print(json.dumps([topk._kernels() is None, topk._kernels() is None, records]))
"""


@pytest.mark.slow
@needs_triton
def test_without_a_new_enough_triton_it_is_said_once() -> None:
    first, second, said = child(OLD)
    assert first and second and len(said) == 1 and "which has no tl.gather" in said[0]


INTERPRET = """
import json
from megatron_ep_v2.kernels import topk_triton
from tests.helpers.topk_kernels import wrong

print(json.dumps(wrong(topk_triton, "cpu")))
"""


@pytest.mark.slow
@needs_triton
def test_the_kernels_equal_a_stable_sort_in_tritons_interpreter() -> None:
    assert child(INTERPRET, TRITON_INTERPRET="1") == []


COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_ep_v2.kernels import topk_triton

found = {}
for kernel, pointers in ((topk_triton._select, "*fp32 *fp32 *i64"), (topk_triton._spread, "*fp32 *i64 *fp32")):
    constants = {"EXPERTS": 128, "WIDTH": 128, "TOPK": 8, "ROWS": 16}
    kinds = [*pointers.split(), "i32", *["constexpr"] * 4]
    source = ASTSource(kernel, dict(zip(kernel.arg_names, kinds, strict=True)), constants,
                       {(i,): [["tt.divisibility", 16]] for i in range(3)})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    found[kernel.__name__] = sorted(set(re.findall(r"(?:ld|st)\\.global\\S*", ptx)))
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_triton
def test_the_kernels_compile_for_gpus_and_move_16_bytes_at_a_time(tmp_path: Path) -> None:
    found = child(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert "ld.global.v4.b32" in found["_select"] and "st.global.v4.b32" in found["_spread"]
