"""The reference buffer: the contract of `contract.py` on `torch.distributed`, on CPU (gloo) and GPU (nccl).

It trains on a laptop and is the reference for the other buffers, so it is strict where they are fast:

- Results repeat bit for bit. Received rows are ordered by (source rank, token), an expert's rows likewise, and sums run
  in a fixed order, accumulated in at least fp32 (fp64 for fp64): first a token's selections on one rank, in column
  order, rounded to the payload's dtype as the wire carries it; then the ranks in order.
- Rows that deep_ep leaves uninitialised are NaN here, with plausible ids, so that code which reads them fails on every
  machine.
- A rank that refuses its input reports so in the call's header, and every rank raises at once.
- What DeepEP would refuse on GPUs is refused here too, unless the setting `reference_strict` is off (see `limits`).

Each call runs two collectives: the header, for which the host waits on every device; and the rows with weights and ids.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.checks import (
    check_combine,
    check_dispatch,
    check_group_open,
    compare_over_group,
    raise_refusals,
)
from megatron_ep_v2.buffers.contract import BufferSpec, Combined, Dispatched, Payload, Redundancy, Slots, Transfer
from megatron_ep_v2.buffers.limits import check_contiguous, check_limits, check_rows, check_selections
from megatron_ep_v2.buffers.pending import Pending
from megatron_ep_v2.buffers.redundancy import (
    References,
    carve,
    check_one_host,
    check_prefetch,
    check_reduce,
    slot_bytes,
)
from megatron_ep_v2.errors import ClosedError, EPError, InputError
from megatron_ep_v2.settings import Settings, active

T = TypeVar("T")


class ReferenceBuffer:
    """An expert-parallel buffer on `torch.distributed.all_to_all_single`; `contract.Buffer` documents the calls.

    Args:
        group: Process group; its backend must carry the payload's device.
        spec: What the buffer is built for.
        settings: None = those in force.
        hosts: Unused; all carriers take the same arguments.

    Attributes:
        strict: The setting `reference_strict` when the buffer was built.
        tells_refusals: The argument `refusals` of a call reports the caller's refusal to the other ranks; see
            `checks.pass_on`.

    Raises:
        InputError: Strict, and ElasticBuffer is not built for this shape.
    """

    supports_cached_weights = tells_refusals = defers = True
    keeps_topk_idx = False
    num_bytes = num_sms = num_qps = 0  # holds no memory between calls
    comm_stream: torch.cuda.Stream | None = None

    def __init__(
        self, group: ProcessGroup, spec: BufferSpec, settings: Settings | None = None, hosts: Sequence[str] = ()
    ):
        self.group, self.spec, self.strict = group, spec, (settings or active()).reference_strict
        if self.strict:
            check_limits(group, spec, simulated=True)
        self.num_max_tokens_per_rank = spec.num_max_tokens_per_rank
        self.num_ranks, self.rank = group.size(), group.rank()
        self._num_dispatches = 0
        self._destroyed = False
        self._slots: Slots | None = None
        if spec.redundancy is not None and self.strict:
            check_one_host(hosts)

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        return 0

    def destroy(self) -> None:
        self._destroyed = True

    def gather_numbers(self, value: int, device: torch.device) -> list[int]:
        """Gather one number from each rank, before a dispatch with rows on `device`. Collective; raises as
        `dispatch`."""
        self._check_open()
        return gather_numbers(self.group, self._num_dispatches + 1, value, device)

    def dispatch(
        self,
        x: Payload,
        *,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        handle: ReferenceHandle | None = None,
        do_cpu_sync: bool = True,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        refusals: list[EPError] | None = None,
    ) -> tuple[Payload, torch.Tensor | None, torch.Tensor | None, ReferenceHandle, None]:
        """See `contract.Buffer.dispatch`. With an fp64 payload, fp64 weights are carried too.

        Args:
            refusals: An error to raise instead of a dispatch, once it has been reported to the other ranks.

        Raises:
            InputError, TokenCapacityError: This rank's input is refused.
            PeerError: Another rank refused its own.
            GroupMismatchError: The ranks disagree on sizes, dtypes, capacity, layout, or on the call itself.
            ClosedError: The buffer or its group was destroyed.
        """
        self._check_open()
        values = list(x) if isinstance(x, tuple) else [x]
        capacity, alignment = num_max_tokens_per_rank or self.num_max_tokens_per_rank, expert_alignment or 1
        refusals = refusals or []
        try:
            if not refusals:
                check_dispatch(
                    x, topk_idx, topk_weights, num_experts, capacity, handle, do_expand, self.group, do_cpu_sync
                )
                self._check_carried(x, topk_idx, topk_weights, num_experts)
        except EPError as error:
            refusals.append(error)
        if handle is not None:
            agree_to_repeat(self.group, "cached dispatch", handle, x, topk_weights, refusals)
            route, selections = handle.route, []
        else:
            self._num_dispatches += 1
            route = agree_on_route(
                self.group,
                self._num_dispatches,
                x,
                topk_idx,
                topk_weights,
                num_experts,
                capacity,
                alignment,
                do_expand,
                do_cpu_sync,
                refusals,
            )
            assert topk_idx is not None
            token = torch.arange(len(topk_idx), device=topk_idx.device)[:, None]
            selections = [torch.cat([token, topk_idx], dim=1).to(torch.int32)]
        weights = [] if topk_weights is None else [topk_weights]
        columns = values + weights + selections
        received = exchange_rows(self.group, columns, route.send_tokens, route.send_counts, route.recv_counts)
        if handle is None:
            assert topk_idx is not None and num_experts is not None  # else check_dispatch raised
            handle = make_handle(
                self.group, topk_idx, received.pop(), num_experts, capacity, alignment, num_sms, do_expand, route
            )
            if not do_cpu_sync:
                handle = forget_counts(handle, self.num_ranks)

        if do_expand:
            received = expand_rows(
                received,
                handle.recv_src_metadata[:, 2:].long(),
                handle.num_expanded_tokens,
                has_weights=bool(weights),
                zero=do_zero_padding,
            )
        else:
            received = [with_garbage(rows, handle.num_recv_tokens) for rows in received]
        recv_weights = received.pop() if weights else None
        recv_x = (received[0], received[1]) if isinstance(x, tuple) else received[0]
        return recv_x, None if do_expand else handle.recv_topk_idx.clone(), recv_weights, handle, None

    def start_dispatch(self, x: Payload, **arguments: Any) -> Pending[Dispatched]:
        """See `contract.DeferringBuffer.start_dispatch`. The exchange runs at once, so that a rank which refuses its
        input is heard of; the rows are handed over at the wait."""
        return _has_run(self.dispatch(x, **arguments))

    def start_combine(
        self, x: torch.Tensor, handle: ReferenceHandle, topk_weights: torch.Tensor | None = None, **arguments: Any
    ) -> Pending[Combined]:
        """See `contract.DeferringBuffer.start_combine`. As `start_dispatch`."""
        return _has_run(self.combine(x, handle, topk_weights, **arguments))

    def combine(
        self,
        x: torch.Tensor,
        handle: ReferenceHandle,
        topk_weights: torch.Tensor | None = None,
        *,
        num_sms: int = 0,
        refusals: list[EPError] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """See `contract.Buffer.combine`. refusals: See `dispatch`.

        Raises:
            InputError: Shapes or dtypes do not fit the handle.
            PeerError: Another rank refused its own rows.
            GroupMismatchError: The ranks disagree on hidden size, dtypes, or on the call itself.
            ClosedError: The buffer or its group was destroyed.
        """
        self._check_open()
        refusals = refusals or []
        try:
            if not refusals:
                check_combine(x, handle, topk_weights, self.group)
                check_dtype(x, self.rank)
                if self.strict:
                    check_rows(self.group, self.spec, x, torch.bfloat16, simulated=True)
                    check_contiguous(self.group, topk_weights, "topk_weights", simulated=True)
        except EPError as error:
            refusals.append(error)
        agree_to_repeat(self.group, "combine", handle, x, topk_weights, refusals)
        real = sum(handle.route.recv_counts)  # x has more rows if the dispatch did not wait for the count
        columns, weights = [x[:real]], topk_weights
        if handle.do_expand:
            slots = handle.recv_src_metadata[:, 2:]
            held = slots >= 0
            columns = [sum_rows(x, slots[held], held.sum(dim=1))]
            weights = None if weights is None else weights[slots.clamp(min=0)]
        if weights is not None:
            columns.append(weights[:real])
        route = handle.route
        returned = exchange_rows(self.group, columns, None, route.recv_counts, route.send_counts)

        num_tokens, num_topk = handle.topk_idx.shape
        by_token = torch.argsort(route.send_tokens, stable=True)  # rows of one token stay in rank order
        combined_x = sum_rows(returned[0], by_token, torch.bincount(route.send_tokens, minlength=num_tokens))
        if topk_weights is None:
            return combined_x, None, None
        ranks = torch.arange(self.num_ranks, device=x.device)
        sent_to = ranks.repeat_interleave(torch.tensor(route.send_counts, device=x.device))
        selected_rank = handle.topk_idx[route.send_tokens] // (handle.num_experts // self.num_ranks)  # -1 stays -1
        row, k = (selected_rank == sent_to[:, None]).nonzero(as_tuple=True)
        combined_weights = topk_weights.new_zeros(num_tokens, num_topk)
        combined_weights[route.send_tokens[row], k] = returned[1][row, k]
        return combined_x, combined_weights, None

    def slots(self) -> Slots:
        """See `contract.RedundantBuffer.slots`. All are NaN until a prefetch has filled them.

        Raises:
            InputError: The buffer was built without.
        """
        if self._slots is None:
            redundancy = self._redundancy()
            on_gpu = "nccl" in dist.get_backend(self.group)
            device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
            memory = torch.empty(slot_bytes(redundancy), dtype=torch.uint8, device=device)
            self._slots = carve(redundancy, memory)
            for slot in (*self._slots.weights, *self._slots.grads):
                slot.fill_(float("nan"))
        return self._slots

    def prefetch_weights(self, slots: Slots, weights: Sequence[torch.Tensor], mapping: torch.Tensor) -> Transfer:
        """See `contract.RedundantBuffer.prefetch_weights`.

        Raises:
            InputError: This rank's arguments are refused.
            PeerError: Another rank refused its own.
            GroupMismatchError: The ranks disagree on the mapping, on sizes, or on the call itself.
            ClosedError: The buffer or its group was destroyed.
        """
        self._agree_on_mapping(
            "prefetch_weights",
            mapping,
            slots.weights[0].device,
            lambda: check_prefetch(self.group, self._redundancy(), self.slots(), slots, weights, mapping),
        )
        return References(self.group, self._redundancy()).prefetch(slots, weights, mapping)

    def reduce_grads(self, slot_grads: torch.Tensor, grads: torch.Tensor, mapping: torch.Tensor) -> Transfer:
        """See `contract.RedundantBuffer.reduce_grads`. Raises as `prefetch_weights`."""
        self._agree_on_mapping(
            "reduce_grads",
            mapping,
            slot_grads.device,
            lambda: check_reduce(self.group, self._redundancy(), self.slots(), slot_grads, grads, mapping),
        )
        return References(self.group, self._redundancy()).reduce(slot_grads, grads, mapping)

    def _redundancy(self) -> Redundancy:
        if self.spec.redundancy is None:
            raise InputError(
                "this reference buffer was built without replica slots",
                needed="BufferSpec.redundancy",
                fix="build it with them: set MCORE_DEEPEP_V2_REDUNDANT_EXPERTS before the first dispatch",
            )
        return self.spec.redundancy

    def _agree_on_mapping(
        self, call: str, mapping: torch.Tensor, device: torch.device, check: Callable[[], None]
    ) -> None:
        """Exchange the header of a transfer of redundant experts."""
        self._check_open()
        refusals: list[EPError] = []
        try:
            check()
        except EPError as error:
            refusals.append(error)
        facts = _facts(call, self._num_dispatches, torch.empty(0), None, None, 0, 0, 0, False, True)
        checksum = zlib.crc32(repr(mapping.tolist()).encode())
        facts = {("mapping (checksum)" if name == "num_experts" else name): value for name, value in facts.items()}
        facts["mapping (checksum)"] = checksum
        _exchange(self.group, device, facts, refusals)

    def _check_carried(
        self, x: Payload, topk_idx: torch.Tensor | None, topk_weights: torch.Tensor | None, num_experts: int | None
    ) -> None:
        """Refuse what the reference cannot carry; if strict, also what ElasticBuffer cannot."""
        rows, dtype = (x[0], torch.float8_e4m3fn) if isinstance(x, tuple) else (x, torch.bfloat16)
        check_dtype(rows, self.rank)
        if self.strict:
            check_rows(self.group, self.spec, rows, dtype, simulated=True)
            check_selections(self.group, self.spec, topk_idx, topk_weights, num_experts, simulated=True)
        if topk_idx is not None:
            check_distinct(topk_idx, self.rank)

    def _check_open(self) -> None:
        if self._destroyed:
            raise ClosedError("this reference buffer was destroyed", fix="ask get_buffer() for a new one")
        check_group_open(self.group)


def _has_run(result: T) -> Pending[T]:
    """A call that has run on the current stream."""
    pending = Pending(lambda: result)
    pending.finish()
    return pending


# ----------------------------------------------------------------------------------------------------- header of a call
#
# The number of rows between each pair of ranks, and the facts that every rank must agree on. It has one size for all
# calls and goes before the rows. So a rank can report that it refuses its rows; and if ranks differ in what they send,
# or in the call itself, all of them raise before a message of an unexpected size arrives.

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
_CALLS = ("dispatch", "cached dispatch", "combine", "prefetch_weights", "reduce_grads")


@dataclass(frozen=True)
class Route:
    """Rows that the ranks exchange for one batch.

    Attributes:
        number: Number of the dispatch, counted by its buffer; the same on every rank.
        send_tokens: [S] int64, the token of each row that this rank sends, by (destination rank, token).
        send_counts: Rows sent to each rank.
        recv_counts: Rows received from each rank.
    """

    number: int
    send_tokens: torch.Tensor
    send_counts: list[int]
    recv_counts: list[int]


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


# --------------------------------------------------------------------------------------------------------------- handle


@dataclass(frozen=True)
class ReferenceHandle:
    """`contract.Handle`, and the route and ids with which the reference repeats or reverses the routing."""

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: torch.Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    psum_num_recv_tokens_per_expert: torch.Tensor
    num_unaligned_recv_tokens_per_expert: torch.Tensor | None
    recv_src_metadata: torch.Tensor
    route: Route
    recv_topk_idx: torch.Tensor  # [R, K] int64 local expert ids, -1 elsewhere


def make_handle(
    group: ProcessGroup,
    topk_idx: torch.Tensor,
    recv_selections: torch.Tensor,
    num_experts: int,
    capacity: int,
    alignment: int,
    num_sms: int,
    do_expand: bool,
    route: Route,
) -> ReferenceHandle:
    """Assign a slot to every received selection. recv_selections: [R, 1 + K] int32, source token and global expert
    ids."""
    device = topk_idx.device
    num_local = num_experts // group.size()
    local_idx = recv_selections[:, 1:].long() - group.rank() * num_local
    is_local = (local_idx >= 0) & (local_idx < num_local)
    local_idx = torch.where(is_local, local_idx, -1)
    row, k = is_local.nonzero(as_tuple=True)
    expert = local_idx[row, k]
    counts = torch.bincount(expert, minlength=num_local)
    padded = (counts + alignment - 1) // alignment * alignment
    ends = padded.cumsum(dim=0)

    slots = torch.full_like(local_idx, -1)
    by_expert = torch.argsort(expert, stable=True)
    rank_in_expert = torch.arange(len(expert), device=device) - (counts.cumsum(0) - counts)[expert[by_expert]]
    slots[row[by_expert], k[by_expert]] = (ends - padded)[expert[by_expert]] + rank_in_expert

    recv_counts = torch.tensor(route.recv_counts, device=device)
    source_rank = torch.arange(group.size(), device=device).repeat_interleave(recv_counts)
    source = source_rank * capacity + recv_selections[:, 0]
    first_selection = is_local.int().argmax(dim=1)
    metadata = torch.stack([source, source_rank * topk_idx.shape[1] + first_selection], dim=1)
    return ReferenceHandle(
        do_expand=do_expand,
        num_experts=num_experts,
        expert_alignment=alignment,
        num_max_tokens_per_rank=capacity,
        num_sms=num_sms,
        topk_idx=topk_idx.clone(),
        num_recv_tokens=len(recv_selections),
        num_expanded_tokens=int(ends[-1]),
        num_recv_tokens_per_expert_list=padded.tolist(),
        psum_num_recv_tokens_per_scaleup_rank=recv_counts.cumsum(0).int(),
        psum_num_recv_tokens_per_expert=(ends - padded + counts if do_expand else ends).int(),
        num_unaligned_recv_tokens_per_expert=counts.int() if do_expand else None,
        recv_src_metadata=torch.cat([metadata, slots if do_expand else torch.full_like(slots, -1)], dim=1).int(),
        route=route,
        recv_topk_idx=local_idx,
    )


def forget_counts(handle: ReferenceHandle, num_ranks: int) -> ReferenceHandle:
    """The handle of a dispatch without a host wait: upper bounds instead of counts, garbage from row R on."""
    num_local = handle.num_experts // num_ranks
    most, alignment = num_ranks * handle.num_max_tokens_per_rank, handle.expert_alignment
    selections = most * min(handle.topk_idx.shape[1], num_local) + (alignment - 1) * num_local
    ids = with_garbage(handle.recv_topk_idx, most)
    ids[handle.num_recv_tokens :] %= num_local  # ids that look real
    return replace(
        handle,
        num_recv_tokens=most,
        num_expanded_tokens=-(-selections // alignment) * alignment,
        num_recv_tokens_per_expert_list=[],
        recv_src_metadata=with_garbage(handle.recv_src_metadata, most),
        recv_topk_idx=ids,
    )


# --------------------------------------------------------------------------------- rows: no loop over tokens or experts

# By bytes per element. float8 can be neither gathered nor scattered, so rows are moved as integers.
_SAME_SIZE_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def exchange_rows(
    group: ProcessGroup,
    columns: list[torch.Tensor],
    chosen: torch.Tensor | None,
    send_counts: list[int],
    recv_counts: list[int],
) -> list[torch.Tensor]:
    """Send rows of several matrices to the ranks of a group in one message each.

    Args:
        group: Process group.
        columns: Matrices [N, ...] with a common N, of any dtypes. The list is emptied, so that temporary rows are freed
            once they are packed.
        chosen: [sum(send_counts)] int64, the row sent at each position; None = all N, in order.
        send_counts, recv_counts: Rows to and from each rank.

    Returns:
        [sum(recv_counts), ...] for each matrix, in the order of the sending ranks: views into the received message.
    """
    if len(columns) == 1 and chosen is None:
        message = columns.pop()
        # An empty view counts as contiguous whatever its strides, but cannot be viewed as bytes.
        message = message.contiguous() if len(message) else message.new_empty(message.shape)
        incoming = message.new_empty(sum(recv_counts), message.shape[1])
        _all_to_all(incoming.view(torch.uint8), message.view(torch.uint8), recv_counts, send_counts, group)
        return [incoming]

    # Each matrix and each row starts at a multiple of 8 bytes, so that every dtype can be viewed in place.
    spans, row_bytes = [], 0
    for column in columns:
        num_bytes = column.shape[1] * column.element_size()
        spans.append((slice(row_bytes, row_bytes + num_bytes), column.dtype))
        row_bytes += -(-num_bytes // 8) * 8

    outgoing = torch.empty(sum(send_counts), row_bytes, dtype=torch.uint8, device=columns[0].device)
    for span, dtype in reversed(spans):
        kind = _SAME_SIZE_INT[dtype.itemsize]
        source, target = columns.pop().contiguous().view(kind), outgoing[:, span].view(kind)
        if chosen is None:
            target.copy_(source)
        else:
            torch.index_select(source, 0, chosen, out=target)
    del source
    incoming = outgoing.new_empty(sum(recv_counts), row_bytes)
    _all_to_all(incoming, outgoing, recv_counts, send_counts, group)
    return [incoming[:, span].view(dtype) for span, dtype in spans]


def sum_rows(rows: torch.Tensor, order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sum groups of rows: group i takes the next counts[i] entries of `order`.

    embedding_bag sums in one pass, in the given order, with fp32 accumulators for 2-byte rows.

    Args:
        rows: [N, H].
        order: [M] row numbers.
        counts: [G] entries per group, adding up to M.

    Returns:
        [G, H] in the dtype of `rows`; empty groups are zero.
    """
    if len(order) == 0:
        return rows.new_zeros(len(counts), rows.shape[1])
    return F.embedding_bag(order.long(), rows.contiguous(), counts.cumsum(0) - counts, mode="sum")


def expand_rows(
    columns: list[torch.Tensor], slots: torch.Tensor, num_slots: int, *, has_weights: bool, zero: bool
) -> list[torch.Tensor]:
    """Copy received rows to the slots of their selections.

    Args:
        columns: Matrices [R, ...]; with `has_weights`, the last one is [R, K] weights.
        slots: [R, K] int64, the slot of each selection, -1 = none here.
        num_slots: P; slots without a selection are padding.
        has_weights: See `columns`.
        zero: Fill padding with zeros instead of NaN.

    Returns:
        [P, ...] for each matrix; [P] for the weights.
    """
    row, k = (slots >= 0).nonzero(as_tuple=True)
    slot = slots[row, k]
    source = torch.full((num_slots,), -1, device=slots.device)
    source[slot] = row
    spread = []
    if has_weights:
        *columns, weights = columns
        spread_weights = weights.new_full((num_slots,), 0.0 if zero else float("nan"))
        spread_weights[slot] = weights[row, k]
    for column in columns:
        bits = column.view(_SAME_SIZE_INT[column.dtype.itemsize]).index_select(0, source.clamp(min=0))
        if len(row) < num_slots:
            bits[source < 0] = 0 if zero else _nan_bits(column.dtype)
        spread.append(bits.view(column.dtype))
    return [*spread, spread_weights] if has_weights else spread


def with_garbage(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The rows [N, ...], contiguous, extended to `num_rows` (N or more) with garbage, which deep_ep leaves
    uninitialised: NaN, or row numbers for integer dtypes."""
    if len(rows) == num_rows:
        return rows.contiguous()
    longer = rows.new_empty(num_rows, *rows.shape[1:])
    longer[: len(rows)] = rows
    tail = longer[len(rows) :]
    if rows.is_floating_point():
        tail.view(_SAME_SIZE_INT[rows.dtype.itemsize]).fill_(_nan_bits(rows.dtype))
    else:
        tail.copy_(torch.arange(len(tail), device=rows.device)[:, None])
    return longer


def _nan_bits(dtype: torch.dtype) -> int:
    """NaN as an integer of the same size; all ones for packs of UE8M0, whose NaN is 0xFF."""
    if not dtype.is_floating_point:
        return -1
    return int(torch.tensor(float("nan"), dtype=dtype, device="cpu").view(_SAME_SIZE_INT[dtype.itemsize]))


def _all_to_all(
    incoming: torch.Tensor, outgoing: torch.Tensor, recv_counts: list[int], send_counts: list[int], group: ProcessGroup
) -> None:
    dist.all_to_all_single(
        incoming, outgoing, output_split_sizes=recv_counts, input_split_sizes=send_counts, group=group
    )
