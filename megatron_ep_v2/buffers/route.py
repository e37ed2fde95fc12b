"""The header of each call of the reference buffer: who sends how many rows to whom, and whether every rank agrees.

It is of one size for all calls, and comes before any row does. So a rank that refuses its rows tells the others in it,
whatever is wrong with them; and where ranks differ in what they are about to send, or in the call itself, all of them
raise before a message arrives that is not of the size they wait for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep_v2.buffers.checks import compare_over_group, raise_refusals
from megatron_ep_v2.buffers.contract import Payload
from megatron_ep_v2.errors import EPError, InputError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
_CALLS = ("dispatch", "cached dispatch", "combine")


@dataclass(frozen=True)
class Route:
    """Who sends what to whom, for one batch.

    Attributes:
        number: Of the dispatch, counted by its buffer; the same on every rank.
        send_tokens: [S] int64, the token of each row that this rank sends, by (destination rank, token).
        send_counts: Rows sent to each rank.
        recv_counts: Rows received from each rank.
    """

    number: int
    send_tokens: torch.Tensor
    send_counts: list[int]
    recv_counts: list[int]


def agree_on_route(
    group: Any,
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
    """The header of a first dispatch. number: See `Route`. refusals: What this rank raises instead of sending rows,
    which is taken out of the list; empty = nothing.

    Raises:
        EPError: That, once the other ranks have it; PeerError on those.
        GroupMismatchError: On every rank, if they differ in what they dispatch.
    """
    num_ranks = group.size()
    rows, counts = x[0] if isinstance(x, tuple) else x, None
    if not refusals:
        assert topk_idx is not None and num_experts is not None  # or they would have been refused
        selected_rank = torch.where(topk_idx >= 0, topk_idx // (num_experts // num_ranks), num_ranks)
        goes_to = torch.zeros(len(topk_idx), num_ranks + 1, dtype=torch.bool, device=rows.device)
        goes_to = goes_to.scatter_(1, selected_rank, True)[:, :num_ranks]
        counts = goes_to.sum(dim=0)
    facts = _facts(
        "dispatch", number, x, topk_idx, topk_weights, num_experts, capacity, alignment, do_expand, do_cpu_sync
    )
    recv_counts = _exchange(group, rows.device, facts, refusals, counts)
    assert counts is not None  # as it is raised otherwise
    return Route(number, goes_to.t().nonzero()[:, 1], counts.tolist(), recv_counts)


def agree_to_repeat(
    group: Any, call: str, handle: Any, x: Payload, topk_weights: torch.Tensor | None, refusals: list[EPError]
) -> None:
    """The header of a call by a handle. call: "cached dispatch" or "combine". refusals, errors: As `agree_on_route`."""
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


def tell_everyone(group: Any, number: int, value: int, device: torch.device) -> list[int]:
    """The header with nothing to send: one number of each rank. It begins a dispatch, so a rank that is in another call
    is named.

    Args:
        number: Of the dispatch.
        value: Of this rank, 0 or more.
        device: Of the rows that the dispatch will carry.
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
    """What must be equal on every rank, of any call: as many numbers in each."""
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
    }


def _exchange(
    group: Any, device: torch.device, facts: dict[str, int], refusals: list[EPError], counts: torch.Tensor | None = None
) -> list[int]:
    """The rows that come from each rank; or what any of them refuses is raised. counts: [ranks], rows that go there."""
    mine = [len(refusals), *facts.values()]
    outgoing = torch.tensor([0, *mine], device=device).repeat(group.size(), 1)
    if counts is not None:
        outgoing[:, 0] = counts
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group)
    by_rank = incoming.tolist()
    if refusals:
        raise refusals.pop()
    if any(told[1:] != mine for told in by_rank):
        _, refused, *columns = zip(*by_rank, strict=True)
        call = _CALLS[facts["call"]]
        raise_refusals(group, refused, call)
        by_name: dict[str, Any] = dict(zip(facts, columns, strict=True))
        by_name["call"] = [_CALLS[code] for code in by_name["call"]]
        by_name["payload dtype"] = [str(_DTYPES[code]) for code in by_name["payload dtype"]]
        compare_over_group(f"a {call}", by_name)
    return [told[0] for told in by_rank]


def check_dtype(rows: torch.Tensor, rank: int) -> None:
    """Refuse rows that are no floating-point numbers. rank: Of this process in the group."""
    if rows.dtype not in _DTYPES:
        raise InputError(
            f"rank {rank}: the reference buffer cannot carry {rows.dtype}",
            needed="one of " + ", ".join(str(dtype) for dtype in _DTYPES),
            fix="cast the hidden states before the dispatch",
        )


def check_distinct(topk_idx: torch.Tensor, rank: int) -> None:
    """Refuse what other buffers only meet on the device: deep_ep answers a repeated id with a device assertion."""
    ordered = topk_idx.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1)
    if bool(twice.any()):
        token = int(twice.nonzero()[0])
        raise InputError(
            f"rank {rank}: token {token} picks one expert twice",
            found=f"topk_idx[{token}] = {topk_idx[token].tolist()}",
            needed="distinct ids, or -1, in each token",
            fix="take the ids from a top-k over distinct experts",
        )
