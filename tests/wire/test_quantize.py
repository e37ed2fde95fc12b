"""8-bit rows: the PyTorch reference against fp64, and the Triton kernels against the reference as far as a CPU goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ep_v2.wire.formats import FORMATS
from megatron_ep_v2.wire.quantize import dequantize, from_wire, quantize, to_wire
from tests.helpers.fp8_oracle import GROUPS, PACK, arrived, codes, error_bound, scales
from tests.helpers.interpreter import child, needs_triton

HIDDEN = [1, 32, 100, 128, 130, 512, 1000]
BF16_MAX = torch.finfo(torch.bfloat16).max
NAN, INF = float("nan"), float("inf")

each_dtype = pytest.mark.parametrize("dtype", list(GROUPS))


def rows(hidden: int, dtype: torch.dtype, num: int = 40, seed: int = 0) -> torch.Tensor:
    """Normal numbers whose size changes from row to row and inside rows, over 80 binades; a zero row, a zero group."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, hidden, generator=generator, dtype=torch.float64)
    x *= 2.0 ** torch.randint(-20, 21, x.shape, generator=generator)
    x *= 2.0 ** torch.randint(-20, 21, (num, 1), generator=generator)
    x[3], x[4, :32] = 0, 0
    return x.to(dtype)


# ---------------------------------------------------------------------------------------------- reference against fp64


@each_dtype
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_values_are_the_nearest_and_scales_the_smallest(dtype: str, hidden: int, kind: torch.dtype) -> None:
    x = rows(hidden, kind)
    values, packs = quantize(x, FORMATS[dtype])
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape and values.is_contiguous()
    assert packs.shape == (len(x), -(-hidden // PACK)) and packs.element_size() == 4 and packs.is_contiguous()
    by_group = scales(x, dtype)
    if dtype == "fp8":
        assert packs.dtype == torch.float32 and torch.equal(packs.double(), by_group)
    else:
        exponents = torch.stack([packs.int() >> shift & 255 for shift in (0, 8, 16, 24)], dim=2).flatten(1)
        assert packs.dtype == torch.int32 and torch.equal(2.0 ** (exponents.double() - 127), by_group)
    by_column = by_group.repeat_interleave(GROUPS[dtype], dim=1)[:, :hidden]
    assert torch.equal(codes()[values.view(torch.uint8).int()] * by_column, arrived(x, dtype))


@each_dtype
def test_the_scale_at_its_edges(dtype: str) -> None:
    """448 times a power of two still fits; the next number does not."""
    edges = 448.0 * 2.0 ** torch.arange(-110.0, 110.0, 10.0)
    for x, amax in ((edges, 448.0), (edges.nextafter(torch.tensor(torch.inf)), 224.0)):
        values, packs = quantize(x[:, None].expand(-1, GROUPS[dtype]).contiguous(), FORMATS[dtype])
        assert (values.float() == amax).all()
        assert torch.equal(dequantize(values, packs, FORMATS[dtype], torch.float32)[:, 0], edges)


@each_dtype
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_what_arrives_is_exact_and_within_the_bound(dtype: str, hidden: int, kind: torch.dtype) -> None:
    x = rows(hidden, kind)
    for out in (torch.bfloat16, torch.float32):
        y = from_wire(to_wire(x, dtype), dtype, out)
        assert y.dtype == out and torch.equal(y.double(), arrived(x, dtype)), "no rounding but e4m3's"
    error = (y.double() - x.double()).abs()
    assert (error <= error_bound(x, dtype)).all()
    assert error.max() > 0
    assert (y[x == 0] == 0).all()


@each_dtype
def test_quantising_what_arrived_changes_nothing(dtype: str) -> None:
    """So the experts' own quantisation, with the same groups and scales, is exact."""
    y = from_wire(to_wire(rows(1000, torch.bfloat16), dtype), dtype, torch.bfloat16)
    assert torch.equal(from_wire(to_wire(y, dtype), dtype, torch.bfloat16), y)


def test_every_code_comes_back() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    y = dequantize(values, torch.tensor([[0.5], [2.0**100]]), FORMATS["fp8"], torch.float32)
    expected = codes().view(2, 128) * torch.tensor([[0.5], [2.0**100]], dtype=torch.float64)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0, equal_nan=True)


@each_dtype
@pytest.mark.parametrize("num", [0, 1])
def test_few_rows(dtype: str, num: int) -> None:
    x = rows(130, torch.bfloat16)[:num]
    y = from_wire(to_wire(x, dtype), dtype, torch.bfloat16)
    assert torch.equal(y.double(), arrived(x, dtype).view(num, 130))


def test_bf16_travels_as_it_is() -> None:
    x = rows(128, torch.bfloat16)
    assert to_wire(x, "bf16") is x and from_wire(x, "bf16", torch.bfloat16) is x


def test_the_wire_carries_about_half() -> None:
    for dtype in GROUPS:
        payload = to_wire(rows(2048, torch.bfloat16), dtype)
        assert sum(part.nbytes for part in payload) / rows(2048, torch.bfloat16).nbytes == pytest.approx(
            0.516, abs=1e-3
        )


# -------------------------------------------------------------------------------------------------- the documented ends


@each_dtype
def test_zeros_and_padding_are_zeros(dtype: str) -> None:
    zeros = torch.zeros(5, 300, dtype=torch.bfloat16)
    values, packs = quantize(zeros, FORMATS[dtype])
    assert not dequantize(values, packs, FORMATS[dtype], torch.bfloat16).any()
    assert not dequantize(values, torch.zeros_like(packs), FORMATS[dtype], torch.bfloat16).any(), (
        "as a buffer zeroes padding"
    )
    assert (scales(zeros, dtype) == 2.0**-117).all()


@each_dtype
@pytest.mark.parametrize("exponent", [-133, -126, -118, -112, -109, -108])
def test_tiny_groups(dtype: str, exponent: int) -> None:
    """Down to bf16's subnormal numbers: the step does not fall below 2**-126, so nothing that arrives is subnormal."""
    x = (rows(128, torch.float64).sign() * torch.linspace(1, 2, 128)).mul(2.0**exponent).to(torch.bfloat16)
    y = from_wire(to_wire(x, dtype), dtype, torch.bfloat16).double()
    assert ((y - x.double()).abs() <= torch.maximum(2.0**-4 * x.double().abs(), torch.tensor(2.0**-127))).all()
    assert ((y == 0) | (y.abs() >= 2.0**-126)).all()


@each_dtype
def test_huge_values(dtype: str) -> None:
    x = torch.tensor([[3.28e38, -1e38, 1.0, 0.0] + [2.0**100] * 124], dtype=torch.bfloat16)
    y = from_wire(to_wire(x, dtype), dtype, torch.bfloat16)
    assert y.isfinite().all()
    assert ((y - x).abs().double() <= error_bound(x, dtype)).all()
    for largest in (BF16_MAX, -BF16_MAX):
        x[0, 0] = largest
        y = from_wire(to_wire(x, dtype), dtype, torch.bfloat16)
        assert y[0, 0] == (INF if largest > 0 else -INF), "e4m3 rounds it up to 2**128"
        assert y[0, 1:].isfinite().all()


@each_dtype
@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("column", [0, 77, 299])
def test_a_group_that_is_not_finite_arrives_as_nan(dtype: str, bad: float, column: int) -> None:
    x = rows(300, torch.bfloat16, num=6)
    clean = from_wire(to_wire(x, dtype), dtype, torch.bfloat16)
    x[2, column] = bad
    y = from_wire(to_wire(x, dtype), dtype, torch.bfloat16)
    group = GROUPS[dtype]
    hit = torch.zeros(x.shape, dtype=torch.bool)
    hit[2, column // group * group : (column // group + 1) * group] = True
    assert y[hit].isnan().all()
    assert torch.equal(y[~hit], clean[~hit])


# ----------------------------------------------------------------------------------------------------- Triton, on a CPU


INTERPRET = """
import json, torch
from tests.wire.test_quantize import HIDDEN, rows
from megatron_ep_v2.wire import quantize as reference, quantize_triton as kernels
from megatron_ep_v2.wire.formats import FORMATS

wrong = []
for hidden in HIDDEN:
    for name, sent in FORMATS.items():
        # Triton's interpreter does not round to e4m3 as a GPU does: give it what needs no rounding.
        x = reference.dequantize(*reference.quantize(rows(hidden, torch.bfloat16), sent), sent, torch.bfloat16)
        x[5, 0], x[6, -1], x[7] = float("nan"), -float("inf"), 2.0**-130
        x[7] = reference.dequantize(*reference.quantize(x[7:8], sent), sent, torch.bfloat16)
        for kind in (torch.bfloat16, torch.float32):
            ours, theirs = reference.quantize(x.to(kind), sent), kernels.quantize(x.to(kind), sent)
            same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs))
            same = same and ours[1].dtype == theirs[1].dtype and ours[0].dtype == theirs[0].dtype
            back = [module.dequantize(*ours, sent, kind) for module in (reference, kernels)]
            same = same and torch.equal(back[0].isnan(), back[1].isnan())
            if not same or not torch.equal(back[0].nan_to_num(), back[1].nan_to_num()):
                wrong.append([hidden, name, str(kind)])
empty = kernels.quantize(torch.empty(0, 256, dtype=torch.bfloat16), FORMATS["fp8"])
print(json.dumps({"wrong": wrong, "empty": list(kernels.dequantize(*empty, FORMATS["fp8"], torch.bfloat16).shape)}))
"""


@pytest.mark.slow
@needs_triton
def test_the_kernels_equal_the_reference_in_tritons_interpreter() -> None:
    assert child(INTERPRET, TRITON_INTERPRET="1") == {"wrong": [], "empty": [0, 256]}


COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_ep_v2.wire import quantize_triton as kernels

found = {}
pointers = {"_quantize": ("*bf16", "*u8", "*i32"), "_dequantize": ("*u8", "*i32", "*bf16")}
for name, types in pointers.items():
    kernel = getattr(kernels, name)
    kinds = [*types, "i32", *["constexpr"] * 4]
    signature = dict(zip(kernel.arg_names, kinds, strict=True))
    for group, capability in ((128, 90), (32, 90), (32, 100)):
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
        constants = {"PACKS": 16, "HIDDEN": 2048, "GROUP": group, "BLOCK": kernels.BLOCK}
        source = ASTSource(kernel, signature, constants, aligned)
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        found[f"{name} {group} {capability}"] = sorted(set(re.findall(r"(?:ld|st)\\.global\\S*", ptx)))
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_triton
def test_the_kernels_compile_for_gpus_and_move_16_bytes_at_a_time(tmp_path: Path) -> None:
    """Rows in and out; only the scales, 4 bytes for 128 columns, go one by one."""
    found = child(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 6
    for name, moves in found.items():
        assert "ld.global.v4.b32" in moves and "st.global.v4.b32" in moves, name
        assert set(moves) <= {"ld.global.v4.b32", "st.global.v4.b32", "ld.global.b32", "st.global.b32"}, name
