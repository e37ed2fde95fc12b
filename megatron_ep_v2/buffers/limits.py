"""Limits of DeepEP V2. Its buffers check them before a kernel runs. So does the reference buffer in its strict mode, so
that a model that cannot run on DeepEP is refused on a laptop already.

No check waits for a device, and a valid call builds no text.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.contract import MAX_TOPK, BufferSpec
from megatron_ep_v2.errors import InputError
from megatron_ep_v2.generations import GENERATIONS

STRICT_VARIABLE = "MCORE_DEEPEP_V2_REFERENCE_STRICT"

_ANOTHER_BUFFER = "megatron_ep_v2.destroy_buffers() on all ranks between them"

# The combine reads rows in 16-byte pieces, 32 lanes at a time, and refuses a remainder at compile time
# (deep_ep 2.1.0, impls/combine_utils.cuh: kHiddenVec % 32 == 0): 512 bytes, so 256 elements of bf16.
HIDDEN_MULTIPLE = 256
MAX_RANKS, MAX_EXPERTS = 1024, 2048  # deep_ep 2.1.0 and 2.5.0: limits of the workspace (layout.cuh)
MAX_LOCAL_EXPERTS = max(row.max_local_experts or 0 for row in GENERATIONS.values())


def check_limits(
    group: ProcessGroup, spec: BufferSpec, max_local_experts: int | None = None, *, simulated: bool = False
) -> None:
    """Refuse a group or a model that DeepEP is not built for.

    Args:
        group: Process group; only its size is used.
        spec: What the buffer is built for.
        max_local_experts: Most experts a rank of the generation in use; None = of the generation that carries most.
        simulated: The caller is the strict reference buffer; the message says so.

    Raises:
        InputError: A limit of deep_ep's kernels is exceeded; the same on every rank.
    """
    num_ranks = group.size()
    num_local, most_local = spec.num_experts // num_ranks, max_local_experts or MAX_LOCAL_EXPERTS
    limits = (
        (spec.hidden % HIDDEN_MULTIPLE == 0, f"hidden={spec.hidden}", f"a multiple of {HIDDEN_MULTIPLE}"),
        (1 <= spec.num_topk <= MAX_TOPK, f"top-k={spec.num_topk}", f"1 to {MAX_TOPK}"),
        (num_ranks <= MAX_RANKS, f"{num_ranks} ranks", f"at most {MAX_RANKS}"),
        (spec.num_experts <= MAX_EXPERTS, f"{spec.num_experts} experts", f"at most {MAX_EXPERTS}"),
        (num_local <= most_local, f"{num_local} experts a rank", f"at most {most_local}{_elsewhere(most_local)}"),
    )
    for good, found, needed in limits:
        if not good:
            raise InputError(
                f"DeepEP does not carry this shape{_note(simulated)}",
                found=found,
                needed=needed,
                fix=f"change the model's shape, or {_without_deep_ep(simulated)}",
            )


def check_rows(
    group: ProcessGroup, spec: BufferSpec, rows: torch.Tensor, dtype: torch.dtype, *, simulated: bool = False
) -> None:
    """Refuse rows to dispatch or combine that DeepEP cannot carry.

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
        f"rank {group.rank()}: DeepEP cannot carry these rows{_note(simulated)}",
        found=f"{rows.dtype} {tuple(rows.shape)} on {rows.device}{strided}",
        needed=f"{dtype} [rows, {spec.hidden}], contiguous" + ("" if simulated else ", on a CUDA device"),
        fix=fix,
    )


def check_selections(
    group: ProcessGroup,
    spec: BufferSpec,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_experts: int | None,
    max_local_experts: int | None = None,
    *,
    simulated: bool = False,
) -> None:
    """Refuse selections and weights that pass `checks.check_dispatch` but that DeepEP cannot carry.

    Args:
        group, spec, max_local_experts, simulated: As in `check_limits`.
        topk_idx, topk_weights, num_experts: As in `contract.Buffer.dispatch`.

    Raises:
        InputError: Another top-k than the buffer's, too many experts, strided tensors.
    """
    if topk_idx is not None:
        if topk_idx.shape[1] != spec.num_topk:
            raise InputError(
                f"rank {group.rank()}: the group's buffer was built for another top-k{_note(simulated)}",
                found=f"topk_idx {tuple(topk_idx.shape)}",
                needed=f"[{len(topk_idx)}, {spec.num_topk}]",
                fix=f"use one top-k for all layers of a group, or {_ANOTHER_BUFFER}{_or_off(simulated)}",
            )
        if num_experts is not None and num_experts != spec.num_experts:
            check_limits(group, replace(spec, num_experts=num_experts), max_local_experts, simulated=simulated)
    check_contiguous(group, topk_weights, "topk_weights", simulated=simulated)
    check_contiguous(group, topk_idx, "topk_idx", simulated=simulated)


def check_contiguous(group: ProcessGroup, tensor: torch.Tensor | None, name: str, *, simulated: bool = False) -> None:
    """Raise InputError for a strided tensor. name: The argument's name."""
    if tensor is not None and not tensor.is_contiguous():
        raise InputError(
            f"rank {group.rank()}: DeepEP needs contiguous tensors{_note(simulated)}",
            found=f"{name} of shape {tuple(tensor.shape)} with strides {tensor.stride()}",
            fix=f"pass {name}.contiguous(){_or_off(simulated)}",
        )


def _elsewhere(most_local: int) -> str:
    """Name the generations that carry more."""
    more = [row for row in GENERATIONS.values() if (row.max_local_experts or 0) > most_local]
    return f" ({', '.join(f'DeepEP {row.name}: {row.max_local_experts}' for row in more)})" if more else ""


def _note(simulated: bool) -> str:
    return " (the strict reference buffer refuses what DeepEP would refuse on GPUs)" if simulated else ""


def _without_deep_ep(simulated: bool) -> str:
    if simulated:
        return f"set {STRICT_VARIABLE}=off for a run that never goes to DeepEP"
    return f"set MCORE_DEEPEP_V2_BUFFER=reference and {STRICT_VARIABLE}=off to run without DeepEP's kernels"


def _or_off(simulated: bool) -> str:
    return f", or {_without_deep_ep(True)}" if simulated else ""
