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

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.checks import (
    check_combine,
    check_dispatch,
    check_group_open,
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
from megatron_ep_v2.buffers.reference_handle import ReferenceHandle, forget_counts, make_handle
from megatron_ep_v2.buffers.reference_header import (
    agree_on_mapping,
    agree_on_route,
    agree_to_repeat,
    check_distinct,
    check_dtype,
    gather_numbers,
)
from megatron_ep_v2.buffers.reference_rows import exchange_rows, expand_rows, sum_rows, with_garbage
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
            with torch.inference_mode(False):  # see `carve`
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
        agree_on_mapping(self.group, call, self._num_dispatches, mapping, device, refusals)

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
