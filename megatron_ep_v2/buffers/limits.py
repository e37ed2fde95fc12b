"""Limits of DeepEP's ElasticBuffer. `elastic.py` checks them before a kernel runs. So does the reference buffer in its
strict mode, so that a model that cannot run on DeepEP is refused on a laptop already.

No check waits for a device, and a valid call builds no text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_ep_v2.buffers.contract import MAX_TOPK, BufferSpec
from megatron_ep_v2.errors import InputError

STRICT_VARIABLE = "MCORE_DEEPEP_V2_REFERENCE_STRICT"

_ANOTHER_BUFFER = "megatron_ep_v2.destroy_buffers() on all ranks between them"

# The combine reads rows in 16-byte pieces, 32 lanes at a time, and refuses a remainder at compile time
# (deep_ep 2.1.0, impls/combine_utils.cuh: kHiddenVec % 32 == 0): 512 bytes, so 256 elements of bf16.
HIDDEN_MULTIPLE = 256
# deep_ep 2.1.0, csrc and layout.cuh: limits of its workspace.
MAX_RANKS, MAX_EXPERTS, MAX_LOCAL_EXPERTS = 1024, 2048, 256


def check_limits(group: Any, spec: BufferSpec, *, simulated: bool = False) -> None:
    """Refuse a group or a model that ElasticBuffer is not built for.

    Args:
        group: Process group; only its size is used.
        spec: What the buffer is built for.
        simulated: The caller is the strict reference buffer; the message says so.

    Raises:
        InputError: A limit of deep_ep's kernels is exceeded; the same on every rank.
    """
    num_ranks = group.size()
    num_local = spec.num_experts // num_ranks
    limits = (
        (spec.hidden % HIDDEN_MULTIPLE == 0, f"hidden={spec.hidden}", f"a multiple of {HIDDEN_MULTIPLE}"),
        (1 <= spec.num_topk <= MAX_TOPK, f"top-k={spec.num_topk}", f"1 to {MAX_TOPK}"),
        (num_ranks <= MAX_RANKS, f"{num_ranks} ranks", f"at most {MAX_RANKS}"),
        (spec.num_experts <= MAX_EXPERTS, f"{spec.num_experts} experts", f"at most {MAX_EXPERTS}"),
        (num_local <= MAX_LOCAL_EXPERTS, f"{num_local} experts a rank", f"at most {MAX_LOCAL_EXPERTS}"),
    )
    for good, found, needed in limits:
        if not good:
            raise InputError(
                f"deep_ep's ElasticBuffer does not carry this shape{_note(simulated)}",
                found=found,
                needed=needed,
                fix=f"change the model's shape, or {_without_deep_ep(simulated)}",
            )


def check_rows(
    group: Any, spec: BufferSpec, rows: torch.Tensor, dtype: torch.dtype, *, simulated: bool = False
) -> None:
    """Refuse rows to dispatch or combine that ElasticBuffer cannot carry.

    Args:
        group, spec, simulated: As in `check_limits`. If simulated, rows need not be on a GPU.
        rows: [rows, hidden].
        dtype: bf16; float8_e4m3fn for values with scales.

    Raises:
        InputError: Another dtype or hidden size, not contiguous, not on a GPU.
    """
    hidden = rows.shape[1]
    if rows.dtype == dtype and hidden == spec.hidden and rows.is_contiguous() and (simulated or rows.is_cuda):
        return
    if rows.dtype != dtype:
        fix = f"train in bf16 (--bf16), or {_without_deep_ep(simulated)}"
    elif hidden != spec.hidden:
        fix = f"use one hidden size for all layers of a group, or {_ANOTHER_BUFFER}{_or_off(simulated)}"
    elif not rows.is_contiguous():
        fix = f"pass the rows with .contiguous(){_or_off(simulated)}"
    else:
        fix = f"move the rows to the GPU of this rank, or {_without_deep_ep(simulated)}"
    strided = "" if rows.is_contiguous() else f", strides {rows.stride()}"
    raise InputError(
        f"rank {group.rank()}: ElasticBuffer cannot carry these rows{_note(simulated)}",
        found=f"{rows.dtype} {tuple(rows.shape)} on {rows.device}{strided}",
        needed=f"{dtype} [rows, {spec.hidden}], contiguous" + ("" if simulated else ", on a CUDA device"),
        fix=fix,
    )


def check_selections(
    group: Any,
    spec: BufferSpec,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_experts: int | None,
    *,
    simulated: bool = False,
) -> None:
    """Refuse selections and weights that pass `checks.check_dispatch` but that ElasticBuffer cannot carry.

    Args:
        group, spec, simulated: As in `check_limits`.
        topk_idx, topk_weights, num_experts: As in `contract.Buffer.dispatch`.

    Raises:
        InputError: Another top-k than the buffer's, too many experts, strided tensors.
    """
    if topk_idx is not None:
        if topk_idx.shape[1] != spec.num_topk:
            raise InputError(
                f"rank {group.rank()}: the group's ElasticBuffer was built for another top-k{_note(simulated)}",
                found=f"topk_idx {tuple(topk_idx.shape)}",
                needed=f"[{len(topk_idx)}, {spec.num_topk}]",
                fix=f"use one top-k for all layers of a group, or {_ANOTHER_BUFFER}{_or_off(simulated)}",
            )
        if num_experts is not None and num_experts != spec.num_experts:
            check_limits(group, replace(spec, num_experts=num_experts), simulated=simulated)
    check_contiguous(group, topk_weights, "topk_weights", simulated=simulated)
    check_contiguous(group, topk_idx, "topk_idx", simulated=simulated)


def check_contiguous(group: Any, tensor: torch.Tensor | None, name: str, *, simulated: bool = False) -> None:
    """Raise InputError for a strided tensor. name: The argument's name."""
    if tensor is not None and not tensor.is_contiguous():
        raise InputError(
            f"rank {group.rank()}: ElasticBuffer needs contiguous tensors{_note(simulated)}",
            found=f"{name} of shape {tuple(tensor.shape)} with strides {tensor.stride()}",
            fix=f"pass {name}.contiguous(){_or_off(simulated)}",
        )


def _note(simulated: bool) -> str:
    return " (the strict reference buffer refuses what DeepEP would refuse on GPUs)" if simulated else ""


def _without_deep_ep(simulated: bool) -> str:
    if simulated:
        return f"set {STRICT_VARIABLE}=off for a run that never goes to DeepEP"
    return f"set MCORE_DEEPEP_V2_BUFFER=reference and {STRICT_VARIABLE}=off to run without DeepEP's kernels"


def _or_off(simulated: bool) -> str:
    return f", or {_without_deep_ep(True)}" if simulated else ""
