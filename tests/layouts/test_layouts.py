"""Layouts in PyTorch: slots against a loop over selections, rows there and back against fp64, gradients by
differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ep_v2.errors import InputError, LayoutOverflowError
from megatron_ep_v2.layouts import (
    Places,
    check_overflow,
    gather_payload,
    gather_rows,
    gather_weights,
    gather_with_weights,
    place_contiguous,
    place_masked,
    reduce_rows,
    rows_that_fit,
    tma_aligned,
)
from tests.helpers import layout_oracle as oracle
from tests.helpers.layout_oracle import KINDS, NAN, Routing, Slots, routing

LAYOUTS: dict[str, tuple[Any, ...]] = {  # contiguous: rows, alignment; masked: expected_m
    "aligned": ("contiguous", 256, 16),
    "tight": ("contiguous", 200, 1),
    "overflow": ("contiguous", 32, 8),
    "no room": ("contiguous", 0, 8),
    "masked": ("masked", 40),
    "masked overflow": ("masked", 3),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def lay_out(r: Routing, layout: str) -> tuple[Places, Slots]:
    """By the code under test and by the oracle."""
    how, *sizes = LAYOUTS[layout]
    num_recv = torch.tensor(r.num_recv, dtype=torch.int32)
    ours, theirs = (place_contiguous, oracle.contiguous) if how == "contiguous" else (place_masked, oracle.masked)
    return ours(r.topk_idx, num_recv, r.num_experts, *sizes), theirs(r, *sizes)


def values(r: Routing, columns: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    """[R, columns], NaN in rows that were not received."""
    x = torch.randn(len(r.topk_idx), columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[r.num_recv :] = NAN
    return x.to(dtype)


@each_kind
@each_layout
def test_slots(kind: str, layout: str) -> None:
    r = routing(kind)
    places, found = lay_out(r, layout)
    for name in ("slots", "rows", "m_indices", "counts", "ends", "overflow", "needed"):
        tensor = getattr(places, name)
        assert tensor.dtype == torch.int32 and tensor.tolist() == getattr(found, name), name
    sources = [divmod(s, r.topk_idx.shape[1]) if s >= 0 else None for s in places.sources.tolist()]
    assert [-1 if source is None else source[0] for source in sources] == found.rows
    for slot, source in enumerate(sources):
        assert source is None or found.slots[source[0]][source[1]] == slot
    starts = [0, *found.ends[:-1]]
    assert places.padded_counts.tolist() == [end - start for start, end in zip(starts, found.ends, strict=True)]


def test_without_a_count_all_rows_are_real() -> None:
    r = routing("random")
    r.num_recv = 11
    places = place_masked(r.topk_idx[:11], None, r.num_experts, 40)
    assert places.slots.tolist() == oracle.masked(r, 40).slots[:11]


@each_kind
@each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_there_and_back(kind: str, layout: str, dtype: torch.dtype) -> None:
    r = routing(kind)
    places, found = lay_out(r, layout)
    x, weights = values(r, 24, dtype), values(r, r.topk_idx.shape[1], torch.float32, seed=2)
    rows = gather_rows(x, places)
    assert rows.dtype == dtype and torch.equal(rows.double(), oracle.gathered(x, found))
    by_slot = gather_weights(weights, places)
    for slot, row in enumerate(found.rows):
        wanted = weights[row, found.slots[row].index(slot)] if row >= 0 else 0.0
        assert by_slot[slot] == wanted
    assert all(map(torch.equal, gather_with_weights(x, weights, places), (rows, by_slot)))

    rows[places.rows < 0] = NAN  # as a GEMM leaves what it does not compute
    close = {"rtol": {torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-7}[dtype], "atol": 1e-6}
    back = reduce_rows(places.by_expert(rows), places)
    assert back.dtype == dtype
    torch.testing.assert_close(back.double(), oracle.reduced(rows, found), **close)
    weighted = reduce_rows(rows, places, weights)
    torch.testing.assert_close(weighted.double(), oracle.reduced(rows, found, weights), **close)


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("layout", ["aligned", "overflow", "masked overflow"])
def test_gradients_by_differences(kind: str, layout: str) -> None:
    r = routing(kind, rows=13, topk=3)
    places, _ = lay_out(r, layout)
    x, weights = values(r, 3).nan_to_num(0).requires_grad_(), values(r, 3, seed=2).nan_to_num(0).requires_grad_()
    y = torch.randn(places.num_rows, 3, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert not len(x) or check(lambda x: gather_rows(x, places), x)
    assert not len(x) or check(lambda w: gather_weights(w, places), weights)
    assert not len(x) or check(lambda x, w: gather_with_weights(x, w, places), (x, weights))
    assert not len(x) or check(lambda y: reduce_rows(y, places), y)
    assert not len(x) or check(lambda y, w: reduce_rows(y, places, w), (y, weights))


@each_layout
def test_garbage_reaches_no_gradient(layout: str) -> None:
    """NaN in rows that were not received, in the GEMM's padding, and in the gradients of both."""
    r = routing("random")
    places, found = lay_out(r, layout)
    x, weights = values(r, 8).requires_grad_(), values(r, r.topk_idx.shape[1], seed=2).requires_grad_()
    rows = gather_rows(x, places)
    y = torch.where((places.rows >= 0)[:, None], rows.detach(), NAN).requires_grad_()
    out = reduce_rows(y, places, weights)
    out.backward(values(r, 8, seed=3))
    rows.backward(torch.where((places.rows >= 0)[:, None], rows.detach(), NAN))
    assert y.grad is not None and x.grad is not None and weights.grad is not None
    x_too, weights_too = x.detach().requires_grad_(), weights.detach().requires_grad_()
    both = gather_with_weights(x_too, weights_too, places)
    torch.autograd.backward(both, [torch.where((places.rows >= 0)[:, None], rows.detach(), NAN), both[1].detach()])
    assert x_too.grad is not None and weights_too.grad is not None and torch.equal(x_too.grad, x.grad)
    for gradient in (x.grad, y.grad, weights.grad, weights_too.grad):
        assert torch.isfinite(gradient).all()
    torch.testing.assert_close(x.grad, oracle.reduced(rows.detach(), found))
    if places.num_rows:
        assert x.grad.any() and y.grad.any() and weights.grad.any()


@pytest.mark.parametrize("layout", ["aligned", "masked", "masked overflow"])
@pytest.mark.parametrize("kind", ["random", "nothing", "no rows"])
def test_payloads(layout: str, kind: str) -> None:
    """Values and scales of each row arrive together, the scales in the layout that was asked for."""
    r = routing(kind)
    places, found = lay_out(r, layout)
    hidden, num_scales = 256, 5
    codes = torch.randint(256, (len(r.topk_idx), hidden), dtype=torch.uint8).view(torch.float8_e4m3fn)
    exponents = torch.randint(1, 255, (len(r.topk_idx), num_scales), dtype=torch.int32)
    scales = (exponents << 23).view(torch.float32)
    group = places.expected_m or places.num_rows
    shape = [r.num_experts, group] if places.expected_m else [group]
    wanted = oracle.gathered(exponents, found).int().view(*shape, num_scales)

    for layout_of_scales in ("row_major", "mn_major", "ue8m0"):
        moved, moved_scales = gather_payload((codes, scales), places, layout_of_scales)  # type: ignore[arg-type]
        bits = moved.view(torch.uint8)
        assert moved.dtype == codes.dtype and list(moved.shape) == [*shape, hidden]
        assert torch.equal(bits.double().view(-1, hidden), oracle.gathered(codes.view(torch.uint8), found))
        if layout_of_scales == "ue8m0":
            assert moved_scales.dtype == torch.int32
            unpacked = torch.stack([moved_scales >> shift & 255 for shift in (0, 8, 16, 24)], dim=-1).flatten(-2)
            assert torch.equal(unpacked[..., :num_scales], wanted) and not unpacked[..., num_scales:].any()
        else:
            assert torch.equal(moved_scales, (wanted << 23).view(torch.float32))
        if layout_of_scales == "row_major":
            assert moved_scales.is_contiguous()
        else:  # DeepGEMM, check_sf_layout with tma_stride_check
            stride = tma_aligned(group)
            assert stride % 4 == 0 and 0 <= stride - group < 4
            assert moved_scales.stride()[-2:] == (1, stride) and moved_scales.data_ptr() % 16 == 0
            assert moved_scales.dim() == 2 or moved_scales.stride(0) == stride * moved_scales.shape[-1]
    packs = torch.randint(-(2**31), 2**31 - 1, scales.shape, dtype=torch.int32)
    by_column = gather_payload((codes, packs), places, "mn_major")[1]
    assert by_column.dtype == torch.int32
    assert torch.equal(by_column.double().reshape(-1, num_scales), oracle.gathered(packs, found))


def test_overflow_is_an_error_that_names_the_size() -> None:
    r = routing("all")
    for layout in ("overflow", "masked overflow"):
        places, _ = lay_out(r, layout)
        with pytest.raises(LayoutOverflowError, match=f"={int(places.needed)} or more"):
            check_overflow(places)
        needed = int(places.needed)
        roomy = place_masked if places.expected_m else place_contiguous
        sizes = (needed,) if places.expected_m else (needed, 8)
        num_recv = torch.tensor([r.num_recv], dtype=torch.int32)
        enough = roomy(r.topk_idx, num_recv, r.num_experts, *sizes)
        check_overflow(enough)
        assert int(enough.needed) == needed
        smaller = (needed - 1,) if places.expected_m else (needed - 8, 8)
        assert int(roomy(r.topk_idx, num_recv, r.num_experts, *smaller).overflow) > 0


@pytest.mark.parametrize("alignment", [1, 4, 128])
def test_rows_that_fit_are_enough_and_no_block_more(alignment: int) -> None:
    """The worst spread: as many experts as possible one row over a block."""
    for selections in range(0, 40, 3):
        size = rows_that_fit(selections, 6, alignment)
        assert size % alignment == 0
        worst = 0
        for used in range(1, min(6, selections) + 1):
            blocks = used + (selections - used) // alignment  # one row each, the rest in full blocks
            worst = max(worst, blocks * alignment)
        assert size == worst


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_idx": torch.zeros(3, dtype=torch.int64)}, "a layout cannot be made of these selections"),
        ({"topk_idx": torch.zeros(3, 2, dtype=torch.int32)}, "a layout cannot be made of these selections"),
        ({"num_recv": torch.tensor(3)}, "has to be on the device"),
        ({"num_rows": 100}, "come in blocks"),
        ({"experts": 0}, "for 0 experts"),
    ],
)
def test_what_cannot_be_laid_out(change: dict[str, Any], message: str) -> None:
    wanted: dict[str, Any] = {"topk_idx": torch.zeros(3, 2, dtype=torch.int64), "num_recv": None, "experts": 2}
    wanted |= {"num_rows": 128} | change
    with pytest.raises(InputError, match=message):
        place_contiguous(wanted["topk_idx"], wanted["num_recv"], wanted["experts"], wanted["num_rows"])


def test_what_does_not_fit_its_slots() -> None:
    r = routing("random")
    places, _ = lay_out(r, "masked")
    with pytest.raises(InputError, match="received rows do not fit"):
        gather_rows(torch.zeros(len(r.topk_idx) + 1, 4), places)
    with pytest.raises(InputError, match="experts' rows do not fit"):
        reduce_rows(torch.zeros(len(r.topk_idx), 4), places)
    with pytest.raises(InputError, match="weights do not fit"):
        gather_weights(torch.zeros(len(r.topk_idx), 1), places)
    codes, scales = torch.zeros(len(r.topk_idx), 128, dtype=torch.uint8), torch.zeros(len(r.topk_idx), 1)
    with pytest.raises(InputError, match="rows and scales do not fit"):
        gather_payload((codes, scales[1:]), places)
    with pytest.raises(InputError, match="cannot be delivered"):
        gather_payload((codes, scales), places, "column")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="packs of UE8M0 already"):
        gather_payload((codes, scales.int()), places, "ue8m0")
    with pytest.raises(InputError, match="0 rows to an expert"):
        place_masked(r.topk_idx, None, r.num_experts, 0)
