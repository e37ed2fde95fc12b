"""8-bit rows on GPUs: the Triton kernels against the PyTorch reference, whole layers against fp64, TransformerEngine's
own quantisation against ours."""

from __future__ import annotations

import pytest
import torch

from megatron_ep_v2.wire import quantize as reference
from megatron_ep_v2.wire.formats import FORMATS
from megatron_ep_v2.wire.quantize import from_wire, to_wire
from tests.gpu.test_fused import RANKS, all_layers, check_layers
from tests.helpers.fp8_oracle import GROUPS
from tests.helpers.harness import run_ranks
from tests.helpers.progress import say
from tests.wire.test_quantize import HIDDEN, rows

each_dtype = pytest.mark.parametrize("dtype", list(GROUPS))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Where they are numbers; NaN for the same elements."""
    a, b = a.cpu(), b.cpu()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.is_floating_point and not torch.equal(a.float().isnan(), b.float().isnan()):
        return False
    bits = [tensor.contiguous().view(torch.uint8).view(*tensor.shape, tensor.element_size()) for tensor in (a, b)]
    differ = (bits[0] != bits[1]).any(dim=-1)
    return not bool((differ & ~a.float().isnan()).any())


@each_dtype
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [*HIDDEN, 2048, 7168])
def test_the_kernels_equal_the_reference(dtype: str, kind: torch.dtype, hidden: int) -> None:
    """Random sizes over many binades, so that every way of rounding occurs; zeros, NaN, infinity, subnormal numbers."""
    from megatron_ep_v2.wire import quantize_triton as kernels

    sent = FORMATS[dtype]
    x = rows(hidden, kind, num=301)
    x[5, 0], x[6, -1], x[7, hidden // 2] = float("nan"), -float("inf"), torch.finfo(kind).max
    x[8] = (x[8].double().sign() * 2.0**-128).to(kind)
    expected, found = reference.quantize(x, sent), kernels.quantize(x.cuda(), sent)
    assert same_bits(found[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert same_bits(found[1], expected[1])
    for out in (torch.bfloat16, torch.float32):
        assert same_bits(kernels.dequantize(*found, sent, out), reference.dequantize(*expected, sent, out))


@each_dtype
def test_padding_and_empty_payloads(dtype: str) -> None:
    values, scales = to_wire(torch.zeros(0, 512, device="cuda", dtype=torch.bfloat16), dtype)
    assert from_wire((values, scales), dtype, torch.bfloat16).shape == (0, 512)
    padding = (values.new_zeros(40, 512), scales.new_zeros(40, 4))
    assert not from_wire(padding, dtype, torch.bfloat16).any()


WIRES = [("fp8", "bf16"), ("bf16", "fp8"), ("fp8", "fp8"), ("mxfp8", "mxfp8")]


@pytest.mark.parametrize("wire", WIRES, ids="-".join)
def test_layers_against_fp64(wire: tuple[str, str]) -> None:
    """Every buffer and layout of test_fused, also with padding, rows and gradients in different dtypes."""
    names = ("MCORE_DEEPEP_V2_DISPATCH_DTYPE", "MCORE_DEEPEP_V2_GRAD_DISPATCH_DTYPE")
    env = dict(zip(names, wire, strict=True))
    say(f"rows as {wire[0]}, gradients as {wire[1]}")
    check_layers(run_ranks(RANKS, all_layers, backend="nccl", env=env), wire)


@each_dtype
def test_transformer_engine_rounds_to_the_same_numbers(dtype: str) -> None:
    """So what it makes of rows that arrived is exactly those rows: the round trip through bf16 costs no accuracy."""
    te = pytest.importorskip("transformer_engine.pytorch")
    import transformer_engine_torch as tex

    if dtype == "fp8":
        quantizer = te.Float8BlockQuantizer(tex.DType.kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=1)
    elif torch.cuda.get_device_capability() >= (10, 0):
        quantizer = te.MXFP8Quantizer(tex.DType.kFloat8E4M3, rowwise=True, columnwise=False)
    else:
        pytest.skip("MXFP8 needs compute capability 10.0")
    x = rows(2048, torch.bfloat16, num=512).cuda()
    ours = from_wire(to_wire(x, dtype), dtype, torch.bfloat16)
    assert torch.equal(quantizer(x).dequantize(dtype=torch.bfloat16), ours)
    assert torch.equal(quantizer(ours).dequantize(dtype=torch.bfloat16), ours)
