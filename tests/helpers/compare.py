"""Comparisons: bits, relative errors, and what a buffer delivered with what the oracle says, by the identity of
rows and never by their order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from tests.helpers import dispatch_oracle as oracle
from tests.helpers.cases import Batch, Case


def same_bits(a: Any, b: Any) -> bool:
    """Equal in type, shape and every bit: NaN equals itself, and 0 is not -0."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        return isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and all(map(same_bits, a, b))
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    first, second = (tensor.cpu().contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(first, second)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """In L2. What must be zero must be exactly zero, else the error is infinite; NaN where `actual` has one."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error, size = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    if size:
        return error / size
    return math.inf if error else 0.0


def relative_errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each of the same tensors, by name."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    return {name: relative_error(actual[name], tensor) for name, tensor in expected.items()}


def worst(values: Iterable[float]) -> float:
    """The largest, and NaN if there is one, which fails every bound. Python's `max` may pass over a NaN."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative L2 error {error:.3g}"


def assert_sums(actual: torch.Tensor, sums: oracle.Sums, num_terms: int) -> None:
    """`actual` is the exact sum up to rounding: of ranks' parts, of the result, of additions in fp32."""
    assert actual.shape == sums.total.shape
    assert not actual.isnan().any(), "NaN: padding or a selection of another rank was added"
    payload = torch.finfo(actual.dtype)
    adding = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32)
    inner = payload.eps / 2 * sums.partials + num_terms * adding.eps * sums.terms
    bound = 1.001 * (inner + payload.eps / 2 * (sums.total.abs() + inner) + payload.tiny * payload.eps)
    excess = (actual.double() - sums.total).abs() - bound
    assert (excess <= 0).all(), f"off by {excess.max():.3g} more than rounding explains"


def check_handle(
    case: Case, alignment: int, do_expand: bool, rank: int, handle: dict[str, Any], batch: list[Batch]
) -> None:
    """Every field of the contract."""
    expected = oracle.arrival([b.topk_idx for b in batch], rank, case.experts, alignment)
    assert handle["do_expand"] is do_expand
    assert handle["num_experts"] == case.experts
    assert handle["expert_alignment"] == alignment
    assert handle["num_max_tokens_per_rank"] == case.capacity
    assert isinstance(handle["num_sms"], int)
    assert torch.equal(handle["topk_idx"], batch[rank].topk_idx), "the selections as they were at the dispatch"
    assert handle["num_recv_tokens"] == len(expected.rows)
    assert handle["num_expanded_tokens"] == sum(expected.padded)
    assert list(handle["num_recv_tokens_per_expert_list"]) == expected.padded
    psum_rows = handle["psum_num_recv_tokens_per_scaleup_rank"]
    assert psum_rows.dtype == torch.int32 and psum_rows.tolist() == expected.psum_rows
    psum_experts = handle["psum_num_recv_tokens_per_expert"]
    assert psum_experts.dtype == torch.int32
    assert psum_experts.tolist() == (expected.real_ends if do_expand else expected.psum_padded)
    if do_expand:
        unaligned = handle["num_unaligned_recv_tokens_per_expert"]
        assert unaligned.dtype == torch.int32 and unaligned.tolist() == expected.counts
    metadata = handle["recv_src_metadata"]
    assert metadata.dtype == torch.int32 and metadata.shape == (len(expected.rows), 2 + case.topk)
    assert sorted(arrived_rows(handle)) == sorted(expected.rows), "each (source rank, token) once"


def arrived_rows(handle: dict[str, Any]) -> list[tuple[int, int]]:
    """(source rank, token) of each received row, in the order of the rows."""
    return [divmod(i, handle["num_max_tokens_per_rank"]) for i in handle["recv_src_metadata"][:, 0].tolist()]


def check_compact(
    case: Case, rank: int, delivery: Any, handle: dict[str, Any], batch: list[Batch], weights: bool
) -> None:
    """Rows, local ids and weights of a compact delivery."""
    expected = oracle.arrival([b.topk_idx for b in batch], rank, case.experts, 1)
    sources = arrived_rows(handle)
    assert same_bits(delivery.x, gather([b.x for b in batch], sources))
    if case.scales is not None:
        assert same_bits(delivery.scales, gather([b.scales for b in batch], sources))
    ids = torch.tensor([expected.rows[source] for source in sources], dtype=torch.int64).reshape(-1, case.topk)
    assert same_bits(delivery.topk_idx, ids)
    if not weights:
        assert delivery.topk_weights is None
        return
    wanted = gather([b.topk_weights for b in batch], sources)
    assert delivery.topk_weights.shape == wanted.shape
    assert same_bits(delivery.topk_weights[ids >= 0], wanted[ids >= 0])


def check_expanded(
    case: Case,
    alignment: int,
    rank: int,
    delivery: Any,
    handle: dict[str, Any],
    batch: list[Batch],
    weights: bool,
    padding: str | None,
) -> None:
    """Rows and weights of an expanded delivery, each in its expert's range; `padding` is "zero", "nan" or None."""
    expected = oracle.arrival([b.topk_idx for b in batch], rank, case.experts, alignment)
    assert delivery.topk_idx is None
    assert len(delivery.x) == sum(expected.padded)
    slots: dict[int, oracle.Selection] = {}
    for (source, token), row in zip(arrived_rows(handle), handle["recv_src_metadata"][:, 2:].tolist(), strict=True):
        for k, (slot, expert) in enumerate(zip(row, expected.rows[source, token], strict=True)):
            assert (slot >= 0) == (expert >= 0), f"selection {k} of token {token} of rank {source}"
            if slot >= 0:
                end = expected.real_ends[expert]
                assert end - expected.counts[expert] <= slot < end, "a row outside its expert's range"
                assert slot not in slots, "two selections in one row"
                slots[slot] = (source, token, k)
    real = torch.tensor(list(slots), dtype=torch.int64)
    sources = [(source, token) for source, token, _ in slots.values()]
    assert same_bits(delivery.x[real], gather([b.x for b in batch], sources))
    columns = [delivery.x]
    if case.scales is not None:
        assert same_bits(delivery.scales[real], gather([b.scales for b in batch], sources))
        columns.append(delivery.scales)
    if weights:
        wanted = [batch[source].topk_weights[token, k] for source, token, k in slots.values()]
        assert delivery.topk_weights.shape == (sum(expected.padded),)
        assert same_bits(delivery.topk_weights[real], torch.stack(wanted) if wanted else delivery.topk_weights[:0])
        columns.append(delivery.topk_weights)
    else:
        assert delivery.topk_weights is None
    padded = torch.tensor([slot for slot in range(len(delivery.x)) if slot not in slots], dtype=torch.int64)
    for column in columns:
        rows = column[padded]
        if padding == "zero":
            assert (rows.view(torch.uint8) == 0).all()
        elif padding == "nan":
            assert (rows.float().isnan() if rows.is_floating_point() else rows == UE8M0_NANS).all()


UE8M0_NANS = -1  # four times 0xFF


def gather(by_rank: Sequence[torch.Tensor], sources: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Row `token` of rank `source` for each (source, token)."""
    rows = [by_rank[source][token] for source, token in sources]
    return torch.stack(rows) if rows else by_rank[0][:0]
