"""The reference buffer's first exchange: who sends how many rows to whom, and whether everyone agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep_v2.buffers.checks import check_dispatch, compare_over_group, raise_refusals
from megatron_ep_v2.buffers.contract import Payload
from megatron_ep_v2.errors import EPError, InputError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Route:
    """Who sends what to whom, for one batch.

    Attributes:
        send_tokens: [S] int64, the token of each row that this rank sends, by (destination rank, token).
        send_counts: Rows sent to each rank.
        recv_counts: Rows received from each rank.
    """

    send_tokens: torch.Tensor
    send_counts: list[int]
    recv_counts: list[int]


def agree_on_route(
    group: Any,
    x: Payload,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_experts: int | None,
    capacity: int,
    alignment: int,
    do_expand: bool,
    do_cpu_sync: bool,
) -> Route:
    """Exchange row counts, beliefs about the call and refusals; raise what anyone refuses."""
    num_ranks, rank = group.size(), group.rank()
    rows, scales = x if isinstance(x, tuple) else (x, None)
    counts = torch.zeros(num_ranks, dtype=torch.int64, device=rows.device)
    refusal: EPError | None = None
    try:
        check_dispatch(x, topk_idx, topk_weights, num_experts, capacity, None, do_expand, group, do_cpu_sync)
        assert topk_idx is not None and num_experts is not None
        _check_strictly(rows, topk_idx, rank)
        picked_rank = torch.where(topk_idx >= 0, topk_idx // (num_experts // num_ranks), num_ranks)
        goes_to = torch.zeros(len(topk_idx), num_ranks + 1, dtype=torch.bool, device=rows.device)
        goes_to = goes_to.scatter_(1, picked_rank, True)[:, :num_ranks]
        counts = goes_to.sum(dim=0)
    except EPError as error:
        refusal = error
    beliefs = {
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
    told = torch.tensor([int(refusal is not None), *beliefs.values()], device=rows.device)
    outgoing = torch.cat([counts[:, None], told.expand(num_ranks, -1)], dim=1)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group)
    recv_counts, refused, *columns = incoming.t().tolist()

    if refusal is not None:
        raise refusal
    raise_refusals(group, refused)
    by_name = dict(zip(beliefs, columns, strict=True))
    by_name["payload dtype"] = [str(_DTYPES[code]) for code in by_name["payload dtype"]]
    compare_over_group("a dispatch", by_name)
    return Route(goes_to.t().nonzero()[:, 1], counts.tolist(), recv_counts)


def _check_strictly(rows: torch.Tensor, topk_idx: torch.Tensor, rank: int) -> None:
    """Refuse what other buffers only meet on the device: deep_ep answers a repeated id with a device assertion."""
    if rows.dtype not in _DTYPES:
        raise InputError(
            f"rank {rank}: the reference buffer cannot carry {rows.dtype}",
            needed="one of " + ", ".join(str(dtype) for dtype in _DTYPES),
            fix="cast the hidden states before the dispatch",
        )
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
