"""What a rank does with one batch in one layout: each call of the buffer contract, and what it leaves, a `Trace`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ep_v2.buffers.contract import BufferSpec
from tests.helpers.cases import Batch, Case, Layout, make_batch, make_batches, strided_copy
from tests.helpers.compare import same_bits
from tests.helpers.progress import say

HANDLE_FIELDS = (
    "do_expand",
    "num_experts",
    "expert_alignment",
    "num_max_tokens_per_rank",
    "num_sms",
    "topk_idx",
    "num_recv_tokens",
    "num_expanded_tokens",
    "num_recv_tokens_per_expert_list",
    "psum_num_recv_tokens_per_scaleup_rank",
    "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert",
    "recv_src_metadata",
)


@dataclass(frozen=True)
class Delivery:
    """What one dispatch returned on one rank."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.x, self.scales, self.topk_idx, self.topk_weights


@dataclass(frozen=True)
class Trace:
    """What one rank saw of one batch in one layout.

    Attributes:
        handle: The fields of the handle, after everything else was done with it.
        first: Of the first dispatch (turn 0).
        again: Of a second, equal dispatch.
        cached: Of a cached dispatch with the values of turn 1, without weights.
        cached_weights: The same with weights.
        combined: Sum of `rows_to_combine`, without weights.
        combined_with_weights: The same call with the weights of `weights_to_combine`.
        combined_again: The same call again, through the handle of `again`.
        inputs_changed: Names of arguments that a call wrote to.
    """

    handle: dict[str, Any]
    first: Delivery
    again: Delivery
    cached: Delivery
    cached_weights: Delivery
    combined: tuple[torch.Tensor, torch.Tensor | None]
    combined_with_weights: tuple[torch.Tensor, torch.Tensor | None]
    combined_again: tuple[torch.Tensor, torch.Tensor | None]
    inputs_changed: list[str]


def returned_rows(case: Case, source: int, do_expand: bool) -> torch.Tensor:
    """What comes back for the tokens of one rank: [T, ranks or K, H], by destination rank or by selection."""
    generator = torch.Generator().manual_seed(9000 + source)
    copies = case.topk if do_expand else case.size
    shape = (case.tokens[source], copies, case.hidden)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(combine_dtype(case))


def returned_weights(case: Case, source: int) -> torch.Tensor:
    """The weights that come back for the tokens of one rank, one for each selection: [T, K] fp32."""
    generator = torch.Generator().manual_seed(9500 + source)
    return torch.rand(case.tokens[source], case.topk, generator=generator)


def combine_dtype(case: Case) -> torch.dtype:
    return torch.bfloat16 if case.dtype == torch.float8_e4m3fn else case.dtype


def rows_to_combine(case: Case, rank: int, handle: Any, do_expand: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`returned_rows` and `returned_weights` where the handle says that they belong, NaN elsewhere."""
    num_rows = handle.num_expanded_tokens if do_expand else handle.num_recv_tokens
    rows = torch.full((num_rows, case.hidden), float("nan"), dtype=combine_dtype(case))
    weights = torch.full((num_rows,) if do_expand else (num_rows, case.topk), float("nan"))
    all_rows = [returned_rows(case, source, do_expand) for source in range(case.size)]
    all_weights = [returned_weights(case, source) for source in range(case.size)]
    batches = make_batches(case)
    for i, (global_token, _, *slots) in enumerate(handle.recv_src_metadata.tolist()):
        source, token = divmod(global_token, handle.num_max_tokens_per_rank)
        if not do_expand:
            rows[i] = all_rows[source][token, rank]
            ids = batches[source].topk_idx[token]
            mine = (ids >= 0) & (ids // case.local_experts == rank)
            weights[i][mine] = all_weights[source][token][mine]
            continue
        for k, slot in enumerate(slots):
            if slot >= 0:
                rows[slot] = all_rows[source][token, k]
                weights[slot] = all_weights[source][token, k]
    return (strided_copy(rows), strided_copy(weights)) if case.strided else (rows, weights)


def exercise_all(
    group: Any,
    factory: Callable[[Any, BufferSpec], Any],
    device_kind: str,
    layouts: dict[Case, list[Layout]],
    cached_weights: bool,
    share_buffers: bool,
) -> dict[Case, dict[Layout, Trace]]:
    """Runs in every rank: several batches of one group size, in several layouts.

    Args:
        cached_weights: The buffer's cached dispatch carries weights too.
        share_buffers: All batches of a shape go through one buffer (building one takes a second or two on GPUs); else
            each layout of each batch has a buffer of its own, destroyed before its results are looked at.
    """
    shared: dict[BufferSpec, Any] = {}

    def share(group: Any, spec: BufferSpec) -> Any:
        if spec not in shared:
            shared[spec] = factory(group, spec)
        return shared[spec]

    traces = {}
    for case, wanted in layouts.items():
        if share_buffers:
            say(f"{case}: {', '.join(map(str, wanted))}", group)
            traces[case] = exercise(group, share, device_kind, case, wanted, cached_weights, destroy=False)
        else:
            traces[case] = exercise(group, factory, device_kind, case, wanted, cached_weights)
    for buffer in shared.values():
        buffer.destroy()
        buffer.destroy()
    return traces


def exercise(
    group: Any,
    factory: Callable[[Any, BufferSpec], Any],
    device_kind: str,
    case: Case,
    layouts: list[Layout],
    cached_weights: bool = True,
    destroy: bool = True,
) -> dict[Layout, Trace]:
    """Runs in every rank: one batch in several layouts, each through what `factory` gives."""
    device = torch.device("cuda", torch.cuda.current_device()) if device_kind == "cuda" else torch.device(device_kind)
    spec = BufferSpec(
        num_max_tokens_per_rank=case.capacity, hidden=case.hidden, num_topk=case.topk, num_experts=case.experts
    )
    return {
        layout: exercise_layout(factory(group, spec), group.rank(), device, case, layout, cached_weights, destroy)
        for layout in layouts
    }


def exercise_layout(
    buffer: Any, rank: int, device: torch.device, case: Case, layout: Layout, cached_weights: bool, destroy: bool
) -> Trace:
    """Every call of the contract on one batch. destroy: the buffer, before the results are looked at."""

    def moved(value: Any) -> Any:
        return tuple(map(moved, value)) if isinstance(value, tuple) else value.to(device)

    batch, other = make_batch(case, rank), make_batch(case, rank, turn=1)
    given = {name: moved(value) for name, value in arguments(batch).items()}
    expand = {"do_expand": layout.do_expand, "do_zero_padding": layout.zero}
    once = {**expand, "num_experts": case.experts, "expert_alignment": layout.alignment}

    *first, handle, _ = buffer.dispatch(**given, **once)
    *again, handle_again, _ = buffer.dispatch(**given, **once)
    first, again = taken_over(*first), delivery(*again)
    repeat = {**expand, "handle": handle, "num_sms": handle.num_sms}
    *cached, cached_handle, _ = buffer.dispatch(moved(other.payload), **repeat)
    *weighted, _, _ = buffer.dispatch(
        moved(other.payload),
        topk_weights=moved(other.topk_weights) if cached_weights else None,
        **{**repeat, "handle": cached_handle},
    )

    rows, weights = map(moved, rows_to_combine(case, rank, handle, layout.do_expand))
    rows_again, weights_again = map(moved, rows_to_combine(case, rank, handle_again, layout.do_expand))
    *combined, _ = buffer.combine(rows, handle)
    *combined_with_weights, _ = buffer.combine(rows, cached_handle, weights, num_sms=handle.num_sms)
    *combined_again, _ = buffer.combine(rows_again, handle_again, weights_again)

    untouched = arguments(make_batch(case, rank))
    changed = [name for name in given if not same_bits(given[name], untouched[name])]
    if not buffer.keeps_topk_idx:
        given["topk_idx"].fill_(0)  # the handle has a copy
    fields = {name: on_host(getattr(handle, name)) for name in HANDLE_FIELDS}
    if destroy:
        buffer.destroy()
        buffer.destroy()
    return Trace(
        handle=fields,
        first=first,
        again=again,
        cached=delivery(*cached),
        cached_weights=delivery(*weighted),
        combined=tuple(map(on_host, combined)),
        combined_with_weights=tuple(map(on_host, combined_with_weights)),
        combined_again=tuple(map(on_host, combined_again)),
        inputs_changed=changed,
    )


def arguments(batch: Batch) -> dict[str, Any]:
    return {"x": batch.payload, "topk_idx": batch.topk_idx, "topk_weights": batch.topk_weights}


def on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def delivery(x: Any, topk_idx: torch.Tensor | None, topk_weights: torch.Tensor | None) -> Delivery:
    values, scales = x if isinstance(x, tuple) else (x, None)
    return Delivery(*map(on_host, (values, scales, topk_idx, topk_weights)))


def taken_over(x: Any, topk_idx: torch.Tensor | None, topk_weights: torch.Tensor | None) -> Delivery:
    """A copy; the tensors themselves are overwritten, as their owner may do: no later call may depend on them."""
    delivered = delivery(x, topk_idx, topk_weights)
    copy = Delivery(*(None if tensor is None else tensor.clone() for tensor in delivered.tensors()))
    for tensor in (*(x if isinstance(x, tuple) else (x,)), topk_idx, topk_weights):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0x55)
    return copy
