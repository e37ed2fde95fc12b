"""The header of a call of the reference buffer.

The number of rows between each pair of ranks, and the facts that every rank must agree on. It has one size for all
calls and goes before the rows. So a rank can report that it refuses its rows; and if ranks differ in what they send,
or in the call itself, all of them raise before a message of an unexpected size arrives.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.checks import compare_over_group, raise_refusals
from megatron_ep_v2.buffers.contract import Payload
from megatron_ep_v2.buffers.reference_handle import ReferenceHandle, Route
from megatron_ep_v2.errors import EPError, InputError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
_CALLS = ("dispatch", "cached dispatch", "combine", "prefetch_weights", "reduce_grads")


def agree_on_route(
    group: ProcessGroup,
    number: int,
    x: Payload,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_experts: int | None,
    capacity: int,
    alignment: int,
    do_expand: bool,
    do_cpu_sync: bool,
    refusals: list[EPError],
) -> Route:
    """Exchange the header of a first dispatch. number: See `Route`. refusals: The error that this rank raises instead
    of sending rows, popped from the list; empty = none.

    Raises:
        EPError: From `refusals`, once it has been reported to the other ranks; PeerError on those.
        GroupMismatchError: On every rank, if their dispatches differ.
    """
    num_ranks = group.size()
    rows, counts = x[0] if isinstance(x, tuple) else x, None
    if not refusals:
        assert topk_idx is not None and num_experts is not None  # else `refusals` has the error
        selected_rank = torch.where(topk_idx >= 0, topk_idx // (num_experts // num_ranks), num_ranks)
        goes_to = torch.zeros(len(topk_idx), num_ranks + 1, dtype=torch.bool, device=rows.device)
        goes_to = goes_to.scatter_(1, selected_rank, True)[:, :num_ranks]
        counts = goes_to.sum(dim=0)
    facts = _facts(
        "dispatch", number, x, topk_idx, topk_weights, num_experts, capacity, alignment, do_expand, do_cpu_sync
    )
    recv_counts = _exchange(group, rows.device, facts, refusals, counts)
    assert counts is not None  # else _exchange raised
    return Route(number, goes_to.t().nonzero()[:, 1], counts.tolist(), recv_counts)


def agree_to_repeat(
    group: ProcessGroup,
    call: str,
    handle: ReferenceHandle,
    x: Payload,
    topk_weights: torch.Tensor | None,
    refusals: list[EPError],
) -> None:
    """Exchange the header of a call with a handle. call: "cached dispatch" or "combine". refusals: See
    `agree_on_route`."""
    rows = x[0] if isinstance(x, tuple) else x
    facts = _facts(
        call,
        handle.route.number,
        x,
        handle.topk_idx,
        topk_weights,
        handle.num_experts,
        handle.num_max_tokens_per_rank,
        handle.expert_alignment,
        handle.do_expand,
        do_cpu_sync=True,
    )
    _exchange(group, rows.device, facts, refusals)


def agree_on_mapping(
    group: ProcessGroup,
    call: str,
    number: int,
    mapping: torch.Tensor,
    device: torch.device,
    refusals: list[EPError],
) -> None:
    """Exchange the header of a transfer of redundant experts. call: "prefetch_weights" or "reduce_grads". number: Of
    the last dispatch. refusals: See `agree_on_route`."""
    checksum = zlib.crc32(repr(mapping.tolist()).encode())
    facts = _facts(call, number, torch.empty(0), None, None, 0, 0, 0, do_expand=False, do_cpu_sync=True)
    _exchange(group, device, facts | {"mapping (checksum)": checksum}, refusals)


def gather_numbers(group: ProcessGroup, number: int, value: int, device: torch.device) -> list[int]:
    """Gather one number from each rank, with a header that announces no rows. It counts as a dispatch's header, so that
    a rank in another call is named.

    Args:
        number: Number of the dispatch.
        value: This rank's number, 0 or more.
        device: Device of the rows that the dispatch will carry.
    """
    facts = _facts("dispatch", number, torch.empty(0), None, None, 0, 0, 0, do_expand=False, do_cpu_sync=True)
    return _exchange(group, device, facts, [], torch.full((group.size(),), value, device=device))


def _facts(
    call: str,
    number: int,
    x: Payload,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_experts: int | None,
    capacity: int,
    alignment: int,
    do_expand: bool,
    do_cpu_sync: bool,
) -> dict[str, int]:
    """Values that must be equal on every rank; the same number of them for every call."""
    rows, scales = x if isinstance(x, tuple) else (x, None)
    return {
        "call": _CALLS.index(call),
        "number of the dispatch": number,
        "hidden": rows.shape[-1] if rows.dim() else 0,
        "top-k": topk_idx.shape[-1] if topk_idx is not None and topk_idx.dim() else 0,
        "num_experts": num_experts or 0,
        "payload dtype": _DTYPES.index(rows.dtype) if rows.dtype in _DTYPES else -1,
        "scales per token": scales.shape[-1] if scales is not None and scales.dim() else 0,
        "bytes per weight": 0 if topk_weights is None else topk_weights.element_size(),
        "num_max_tokens_per_rank": capacity,
        "expert_alignment": alignment,
        "do_expand": int(do_expand),
        "do_cpu_sync": int(do_cpu_sync),
        "mapping (checksum)": 0,  # of a transfer of redundant experts
    }


def _exchange(
    group: ProcessGroup,
    device: torch.device,
    facts: dict[str, int],
    refusals: list[EPError],
    counts: torch.Tensor | None = None,
) -> list[int]:
    """Exchange headers; returns the number of rows from each rank. counts: [ranks], rows sent to each; None = 0."""
    mine = [len(refusals), *facts.values()]
    outgoing = torch.tensor([0, *mine], device=device).repeat(group.size(), 1)
    if counts is not None:
        outgoing[:, 0] = counts
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group)
    by_rank = incoming.tolist()
    if refusals:
        raise refusals.pop()
    if any(header[1:] != mine for header in by_rank):
        _, refused, *columns = zip(*by_rank, strict=True)
        call = _CALLS[facts["call"]]
        raise_refusals(group, refused, call)
        codes = dict(zip(facts, columns, strict=True))
        by_name: dict[str, Sequence[object]] = {
            **codes,
            "call": [_CALLS[code] for code in codes["call"]],
            "payload dtype": [str(_DTYPES[code]) for code in codes["payload dtype"]],
        }
        compare_over_group(f"a {call}", by_name)
    return [header[0] for header in by_rank]


def check_dtype(rows: torch.Tensor, rank: int) -> None:
    """Refuse rows of another dtype than `_DTYPES`. rank: This rank in the group."""
    if rows.dtype not in _DTYPES:
        raise InputError(
            f"rank {rank}: the reference buffer cannot carry {rows.dtype}",
            needed="one of " + ", ".join(str(dtype) for dtype in _DTYPES),
            fix="cast the hidden states before the dispatch",
        )


def check_distinct(topk_idx: torch.Tensor, rank: int) -> None:
    """Refuse a token that selects one expert twice. deep_ep finds it only on the device, with an assertion."""
    ordered = topk_idx.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1)
    if bool(twice.any()):
        token = int(twice.nonzero()[0])
        raise InputError(
            f"rank {rank}: token {token} selects one expert twice",
            found=f"topk_idx[{token}] = {topk_idx[token].tolist()}",
            needed="distinct ids, or -1, in each token",
            fix="take the ids from a top-k over distinct experts",
        )
