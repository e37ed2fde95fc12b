"""Checks that every buffer shares: the arguments of a call, and what must be equal over a group.

None waits for a device: the range of the selections is checked on CPU tensors only. They run in every layer, so a valid
call builds no text and reads each tensor's shape once: `tensor.shape` takes a third of the time of `len`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.contract import MAX_TOPK, Buffer, Handle, Payload
from megatron_ep_v2.errors import ClosedError, EPError, GroupMismatchError, InputError, PeerError, TokenCapacityError

CAPACITY_VARIABLE = "MCORE_DEEPEP_V2_MAX_TOKENS_PER_RANK"

_of_parent: set[ProcessGroup] = set()  # in a forked child: the groups whose buffers belong to its parent


def leave_to_parent(groups: Iterable[ProcessGroup]) -> None:
    """In a forked child: refuse these groups from now on. Their connections and their entries in the store belong to
    the parent process."""
    _of_parent.update(groups)


def check_group_open(group: ProcessGroup) -> None:
    """Raise ClosedError if the process group was destroyed, or belongs to the parent that this process was forked
    from."""
    if _of_parent and group in _of_parent:
        raise ClosedError(
            "this process was forked from a rank, and the process group of this expert-parallel call is that rank's",
            needed="calls from the rank's own process",
            fix="use no model in forked workers, or start them with multiprocessing's spawn and groups of their own",
        )
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ClosedError(
            "the process group of this expert-parallel call is closed",
            found=str(error) or repr(error),
            fix="dispatch before torch.distributed.destroy_process_group(), or initialise a new group",
        ) from error


def check_dispatch(
    x: Payload,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_experts: int | None,
    capacity: int,
    handle: Handle | None,
    do_expand: bool,
    group: ProcessGroup,
    do_cpu_sync: bool = True,
) -> None:
    """Check the arguments of a dispatch, as `contract.Buffer.dispatch` names them.

    Raises:
        InputError, TokenCapacityError: With the rank, what was found and how to fix it.
    """
    rows, scales = x if isinstance(x, tuple) else (x, None)
    shape = rows.shape
    if len(shape) != 2:
        raise InputError(
            f"rank {group.rank()}: the hidden states of a dispatch must be a matrix",
            found=f"shape {tuple(shape)}",
            needed="[tokens, hidden]",
            fix="flatten sequence and batch first: x.view(-1, hidden)",
        )
    num_tokens = shape[0]
    if scales is not None and (scales.dim() != 2 or len(scales) != num_tokens or scales.element_size() != 4):
        raise InputError(
            f"rank {group.rank()}: the scales of an fp8 payload do not fit it",
            found=f"{scales.dtype} {tuple(scales.shape)} for {num_tokens} tokens",
            needed=f"[{num_tokens}, scales] with 4-byte elements (float32, or int32 packs of four UE8M0)",
            fix="pass x=(values, scales) as one quantisation made them",
        )
    if handle is not None:
        _check_cached(group, num_tokens, topk_idx, topk_weights, handle, do_expand)
        return
    if do_expand and not do_cpu_sync:
        raise InputError(
            f"rank {group.rank()}: the expanded layout cannot be sized without a host wait",
            found="do_expand=True, do_cpu_sync=False",
            needed="the compact layout: in the expanded one the most rows that could arrive are top-k times as many",
            fix="pass do_expand=False and sort the rows by expert after it, as megatron_ep_v2.sync_free does",
        )
    _check_selections(group, num_tokens, rows.dtype, topk_idx, topk_weights, num_experts)
    if num_tokens > capacity:
        raise TokenCapacityError(
            f"rank {group.rank()} has {num_tokens} tokens to dispatch; "
            f"its group agreed on num_max_tokens_per_rank={capacity}",
            fix=f"set {CAPACITY_VARIABLE}={num_tokens} or more (the same on every rank)",
        )


def _check_selections(
    group: ProcessGroup,
    num_tokens: int,
    dtype: torch.dtype,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_experts: int | None,
) -> None:
    if not num_experts or num_experts < 0 or num_experts % group.size():
        raise InputError(
            f"rank {group.rank()}: num_experts={num_experts} cannot be spread over a group of {group.size()}",
            needed=f"a positive multiple of {group.size()}",
            fix="choose --num-experts and --expert-model-parallel-size so that one divides the other",
        )
    shape: tuple[int, ...] = () if topk_idx is None else topk_idx.shape
    if topk_idx is None or topk_idx.dtype != torch.int64 or len(shape) != 2 or shape[0] != num_tokens:
        raise InputError(
            f"rank {group.rank()}: topk_idx does not fit the hidden states",
            found="None" if topk_idx is None else f"{topk_idx.dtype} {tuple(shape)}",
            needed=f"torch.int64 [{num_tokens}, top-k]",
            fix="pass the indices of torch.topk over the routing probabilities (int64, one row per token)",
        )
    if not 1 <= shape[1] <= MAX_TOPK:
        raise InputError(
            f"rank {group.rank()}: top-k of {shape[1]} cannot be dispatched",
            needed=f"1 to {MAX_TOPK} selections per token (a limit of deep_ep's kernels)",
            fix="lower --moe-router-topk (times the expert tensor parallel size)",
        )
    if topk_weights is not None:
        wanted = _weight_dtypes(dtype)
        if topk_weights.shape != shape or topk_weights.dtype not in wanted:
            raise InputError(
                f"rank {group.rank()}: topk_weights does not fit topk_idx",
                found=f"{topk_weights.dtype} {tuple(topk_weights.shape)}",
                needed=f"{wanted[-1]} {tuple(shape)}",
                fix="set --moe-router-dtype fp32, or cast the probabilities with .float()",
            )
    if topk_idx.is_cpu and topk_idx.numel() and not -1 <= int(topk_idx.min()) <= int(topk_idx.max()) < num_experts:
        token = int(((topk_idx < -1) | (topk_idx >= num_experts)).any(dim=1).nonzero()[0])
        raise InputError(
            f"rank {group.rank()}: token {token} selects an expert that does not exist",
            found=f"topk_idx[{token}] = {topk_idx[token].tolist()}",
            needed=f"ids from 0 to {num_experts - 1}, or -1 for no selection",
            fix="num_experts must count the experts of the whole group (times the expert tensor parallel size)",
        )


def _check_cached(
    group: ProcessGroup,
    num_tokens: int,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    handle: Handle,
    do_expand: bool,
) -> None:
    if topk_idx is not None:
        raise InputError(
            f"rank {group.rank()}: topk_idx and handle were both given",
            fix="pass one: the handle repeats its own selections",
        )
    if do_expand != handle.do_expand:
        raise InputError(
            f"rank {group.rank()}: the handle's layout is not the one asked for",
            found=f"handle.do_expand={handle.do_expand}, do_expand={do_expand}",
            fix="pass do_expand=handle.do_expand",
        )
    first = handle.topk_idx.shape
    if num_tokens != first[0] or (topk_weights is not None and topk_weights.shape != first):
        weights = "" if topk_weights is None else f" and weights {tuple(topk_weights.shape)}"
        raise InputError(
            f"rank {group.rank()}: a cached dispatch must bring as many tokens as the first one",
            found=f"{num_tokens} tokens{weights}",
            needed=f"{first[0]} tokens, weights {tuple(first)}",
            fix="use the handle only for gradients or replays of the batch that it was made for",
        )


def check_combine(x: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None, group: ProcessGroup) -> None:
    """Check the arguments of a combine, as `contract.Buffer.combine` names them. Raises InputError."""
    do_expand, shape = handle.do_expand, x.shape
    num_rows = handle.num_expanded_tokens if do_expand else handle.num_recv_tokens
    if len(shape) != 2 or shape[0] != num_rows or x.dtype == torch.float8_e4m3fn:
        raise InputError(
            f"rank {group.rank()}: the rows to combine are not those of the dispatch",
            found=f"{x.dtype} {tuple(shape)}",
            needed=f"[{num_rows}, hidden] ({_layout(do_expand)} layout), not fp8",
            fix="return one row for each row that the dispatch delivered, in its order",
        )
    if topk_weights is not None:
        wanted = (num_rows,) if do_expand else (num_rows, handle.topk_idx.shape[1])
        dtypes = _weight_dtypes(x.dtype)
        if topk_weights.shape != wanted or topk_weights.dtype not in dtypes:
            raise InputError(
                f"rank {group.rank()}: the weights to combine are not those of the dispatch",
                found=f"{topk_weights.dtype} {tuple(topk_weights.shape)}",
                needed=f"{dtypes[-1]} {wanted} ({_layout(do_expand)} layout)",
                fix="pass the gradient of the weights that the dispatch delivered",
            )


def _weight_dtypes(rows: torch.dtype) -> tuple[torch.dtype, ...]:
    """Allowed dtypes of the weights that go with rows of this dtype."""
    return (torch.float32, torch.float64) if rows == torch.float64 else (torch.float32,)


def _layout(do_expand: bool) -> str:
    return "expanded" if do_expand else "compact"


def pass_on(buffer: Buffer, refusals: list[EPError]) -> dict[str, Any]:
    """Arguments with which the refused call reports the error to the other ranks and then raises it. Raises it here if
    the buffer cannot report it.

    Args:
        refusals: The error. The code that raises it pops it, so that no frame keeps the error, and with it the rows,
            alive.
    """
    if getattr(buffer, "tells_refusals", False):
        return {"refusals": refusals}
    raise refusals.pop()


def raise_refusals(group: ProcessGroup, refused: Sequence[object], call: str = "dispatch") -> None:
    """Raise PeerError if another rank refused its input.

    Args:
        group: Process group.
        refused: Whether each rank refused.
        call: "dispatch", "cached dispatch" or "combine".
    """
    culprits = [rank for rank, flag in enumerate(refused) if flag]
    if culprits:
        raise PeerError(
            f"rank {group.rank()}: this {call} was given up because rank {culprits[0]} refused its own input",
            found=f"refusing ranks of the group: {culprits}",
            fix=f"read the error of rank {culprits[0]}",
        )


def compare_over_group(what: str, values: Mapping[str, Sequence[object]]) -> None:
    """Raise the same GroupMismatchError on every rank if a value differs between ranks.

    Args:
        what: Purpose of the comparison, e.g. "a dispatch".
        values: Name -> the values of rank 0, 1, ... of the group.
    """
    differing = []
    for name, by_rank in values.items():
        usual = Counter(by_rank).most_common(1)[0][0]
        odd = [f"rank {rank} has {value}" for rank, value in enumerate(by_rank) if value != usual]
        if odd:
            differing.append(f"{name}: {', '.join(odd[:8])}; the others have {usual}")
    if differing:
        raise GroupMismatchError(
            f"the ranks of the expert-parallel group disagree about {what}",
            found="; ".join(differing),
            needed="equal values on every rank (ranks are numbered within the group)",
            fix="start every rank with the same arguments, environment and package versions",
        )
