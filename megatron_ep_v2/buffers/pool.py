"""One buffer per process group, shared by all layers, micro-batches and pipeline chunks.

The first dispatch of a group builds its buffer. Only then do the ranks compare what must be equal and agree on a
capacity; afterwards no rank changes it on its own. If only that first batch says how large batches get, all ranks can
enlarge the buffer together (see `growing`).

A buffer is built on the group that torch.distributed knows and kept under it. If the caller's group forwards to it (see
`groups`) and later forwards to another group, the old buffer is not found any more. It is destroyed when the next one
is built.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import logging
import os
import socket
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2 import device_checks, graphs
from megatron_ep_v2 import settings as settings_module
from megatron_ep_v2.buffers.capacity import Expected, check_stated, choose_capacity
from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.buffers.checks import (
    check_dispatch,
    check_group_open,
    compare_over_group,
    leave_to_parent,
    raise_refusals,
)
from megatron_ep_v2.buffers.contract import Buffer, BufferSpec, Redundancy
from megatron_ep_v2.buffers.groups import find_registered, is_registered, registered
from megatron_ep_v2.buffers.growing import GrowingBuffer
from megatron_ep_v2.errors import EPError
from megatron_ep_v2.probe import choose, loaded_nccl_version, probe
from megatron_ep_v2.settings import Settings
from megatron_ep_v2.watchdog.rendezvous import Rendezvous
from megatron_ep_v2.watchdog.watched_buffer import WatchedBuffer, watch

logger = logging.getLogger("megatron_ep_v2")

_pool: dict[ProcessGroup, Buffer] = {}  # by process group, as torch.distributed knows it
_capacity_source: dict[ProcessGroup, str] = {}  # likewise
_expected_tokens: Callable[[ProcessGroup], Expected] | None = None
# For groups that forward: the caller's group by the group that it forwards to, and the capacity of its last buffer.
_callers: dict[ProcessGroup, weakref.ref[ProcessGroup]] = {}
_reached: weakref.WeakKeyDictionary[ProcessGroup, int] = weakref.WeakKeyDictionary()


def find(group: ProcessGroup) -> Buffer | None:
    """The group's buffer, or None if it was not built. Called once per layer, so it is only a dictionary look-up."""
    buffer = _pool.get(group)
    if buffer is None and (own := find_registered(group)) is not None:
        buffer = _pool.get(own)
    return buffer


def get(
    group: ProcessGroup,
    *,
    hidden: int,
    num_topk: int,
    num_experts: int,
    num_tokens: int,
    payload: str,
    observed: bool = False,
    redundancy: Redundancy | None = None,
    check: Callable[[], None] = lambda: None,
) -> Buffer:
    """The buffer of a group; built by the first call, which is collective. Later calls only look it up: if one rank's
    shape changes, the buffer's checks must raise. A collective here would hang, because the other ranks are not in it.

    Args:
        group: Process group, or one that forwards to it (see `groups.registered`).
        hidden: H of the payload.
        num_topk: K.
        num_experts: Experts in the whole group.
        num_tokens: Tokens of this rank; they count towards the agreed capacity when the buffer is built.
        payload: Name of the payload's dtype.
        observed: `num_tokens` is the size of one batch, and another may be larger. If nothing else gives the size, the
            capacity can grow.
        redundancy: Replica slots that the buffer is built with; None = none.
        check: Raises an EPError if this rank's input cannot be dispatched. Called before a buffer is built, so that
            invalid input never decides its size; the other ranks raise PeerError.

    Raises:
        EPError: Raised by `check`; on the other ranks PeerError.
        GroupMismatchError: On every rank, naming the rank whose value differs.
        TokenCapacityError: The capacity of the settings is below `num_tokens`; on the other ranks PeerError.
        UnavailableError: No buffer can be built here.
        InputError: The buffer does not carry this shape.
        ClosedError: The group was destroyed, or forwards to none.
    """
    buffer = find(group)
    if buffer is None:
        caller, group = group, registered(group)
        check_group_open(group)
        _drop_closed()
        expected = _expect(caller)
        settings = settings_module.active()
        if "auto" in (settings.dispatch_dtype, settings.grad_dispatch_dtype):
            settings_module.settle_dispatch_dtypes("bf16", "no model with an fp8_recipe in the expanded layout")
            settings = settings_module.active()
        found = probe()
        kind, refusal = "", None
        try:
            kind = choose(found, settings, managed=True).kind
            check()
            check_stated(group, num_tokens, settings)
        except EPError as error:  # raised below, after the other ranks have learnt of it
            refusal = error
        facts: dict[str, object] = {
            "hidden": hidden,
            "top-k": num_topk,
            "num_experts": num_experts,
            "payload dtype": payload,
            "redundant experts": redundancy,
            "buffer": kind,
            "deep_ep": found.versions(),
            "NCCL": loaded_nccl_version() if found.cuda else None,
            **{name: getattr(settings, name) for name in settings_module.NAMES},
        }
        rendezvous = Rendezvous(group, settings.watchdog_secs)
        mine = (refusal is not None, facts, (num_tokens, expected), socket.gethostname(), rendezvous.address)
        rendezvous.await_everyone()
        # On NCCL this is also the group's first collective, which creates the communicator that DeepEP borrows.
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, mine, group=group)
        refused, facts_of_ranks, tokens, hosts, addresses = zip(*gathered, strict=True)
        if refusal is not None:
            raise refusal
        raise_refusals(group, refused)
        compare_over_group("their buffer", {name: [each[name] for each in facts_of_ranks] for name in facts})

        capacity, source, may_grow = choose_capacity(settings, tokens, observed)
        spec = BufferSpec(
            num_max_tokens_per_rank=capacity,
            hidden=hidden,
            num_topk=num_topk,
            num_experts=num_experts,
            redundancy=redundancy,
        )

        def build(spec: BufferSpec) -> Buffer:
            module, name = CARRIERS[kind].path
            made: Buffer = getattr(importlib.import_module(module), name)(group, spec, settings, list(hosts))
            return made

        own = cast(Buffer, GrowingBuffer(build, spec)) if may_grow else build(spec)
        buffer = _pool[group] = watch(own, rendezvous, addresses, hosts)
        _capacity_source[group] = source
        if caller is not group:
            _callers[group] = weakref.ref(caller)
        logger.info("%s", ", ".join(f"{name} {value}" for name, value in describe(buffer, settings).items()))
    return buffer


def _expect(caller: ProcessGroup) -> Expected:
    """What the caller's group may dispatch: at least the capacity that its last buffer had grown to."""
    expected = _expected_tokens(caller) if _expected_tokens else Expected()
    before = _reached.get(caller, 0)
    if before > expected.tokens:
        return Expected(before, "the capacity of the buffer that went with the group before", varies=True)
    return expected


def get_buffer(
    group: ProcessGroup,
    x: torch.Tensor,
    token_indices: torch.Tensor,
    num_experts: int,
    token_probs: torch.Tensor | None = None,
    redundancy: Redundancy | None = None,
) -> Buffer:
    """The group's buffer for this payload. Collective the first time; see `get` for what it raises.

    Args:
        group: Process group of the experts (in Megatron: tensor x expert parallel).
        x: [T, H].
        token_indices: [T, K].
        num_experts: Experts in the whole group.
        token_probs: [T, K], checked with the rest before a buffer is built.
        redundancy: See `get`.
    """
    num_tokens = x.shape[0] if x.dim() else 0
    return get(
        group,
        hidden=x.shape[-1] if x.dim() else 0,
        num_topk=token_indices.shape[-1] if token_indices.dim() else 0,
        num_experts=num_experts,
        num_tokens=num_tokens,
        payload=str(x.dtype),
        observed=True,
        redundancy=redundancy,
        check=lambda: check_dispatch(x, token_indices, token_probs, num_experts, num_tokens, None, False, group),
    )


def describe(buffer: Buffer, settings: Settings) -> dict[str, str]:
    """Class, sizes and dtypes of a live buffer, each with its source, for the log and `status()`."""
    carrier: Any = buffer
    while hasattr(carrier, "buffer"):  # unwrap WatchedBuffer and GrowingBuffer
        carrier = carrier.buffer
    source, grown_from = _capacity_source[buffer.group], getattr(buffer, "grown_from", 0)
    if grown_from:
        source = f"grown for a later batch; before, {grown_from}: {source}"
    return {
        "class": type(carrier).__name__,
        "ranks": str(buffer.group.size()),
        "num_max_tokens_per_rank": f"{buffer.num_max_tokens_per_rank} ({source})",
        "dispatch_dtype": settings.describe()["dispatch_dtype"],
        "grad_dispatch_dtype": settings.describe()["grad_dispatch_dtype"],
        "num_sms": _explain(buffer.num_sms, settings, "num_sms"),
        "num_qps": _explain(buffer.num_qps, settings, "num_qps"),
        "num_bytes": str(buffer.num_bytes),
    }


def _explain(value: int, settings: Settings, name: str) -> str:
    return f"{value} ({settings.source(name) if getattr(settings, name) else 'chosen by the buffer'})"


def set_expected_tokens(source: Callable[[ProcessGroup], Expected] | None) -> None:
    """Set the function that returns how many tokens a rank of a group may dispatch (`capacity.expected`); None =
    unknown."""
    global _expected_tokens
    _expected_tokens = source


def buffers() -> list[Buffer]:
    """The live buffers, oldest first."""
    return list(_pool.values())


def destroy_buffers(group: ProcessGroup | None = None) -> None:
    """Destroy the buffers of a group (None or the world: all), newest first. Before them captured graphs go that this
    package keeps (see `graphs`): all of them, if there is a buffer, or for the world. A second call does nothing.

    Must run before torch.distributed.destroy_process_group(); `install()` makes that automatic.

    Args:
        group: Process group, or one that forwards to it.
    """
    everything = group is None or group is dist.group.WORLD
    meant = (group, group and find_registered(group))
    members = [member for member in _pool if everything or any(member is each for each in meant)]
    if everything or members:  # not for any group of some ranks: a replay is collective, and a capture, too
        graphs.drop_all()
    for member in reversed(members):
        _destroy(member)


def _destroy(group: ProcessGroup) -> None:
    buffer, caller = _pool.pop(group), _callers.pop(group, None)
    _capacity_source.pop(group)
    if caller is not None and (alive := caller()) is not None:
        _reached[alive] = buffer.num_max_tokens_per_rank
    device_checks.forget(buffer.group)
    buffer.destroy()


def _drop_closed() -> None:
    """Drop the buffers of groups that were destroyed without our hook on `destroy_process_group`, and end their
    watchers. Not collective: the buffer of a closed group waits for no rank."""
    for group in [group for group in _pool if not is_registered(group)]:
        graphs.drop_all()
        _destroy(group)


def _leave_to_parent() -> None:
    """In a forked child: drop the parent's buffers and watchers, so that neither `destroy_buffers` at exit nor a
    dispatch finds them. One reference to each is leaked, so that their destructors never run here, even at interpreter
    exit."""
    graphs.forget_keepers()
    of_parent = list(_pool.values())
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(of_parent))
    leave_to_parent([*_pool, *(buffer.group for buffer in of_parent)])
    _pool.clear()
    _capacity_source.clear()
    for buffer in of_parent:
        if isinstance(buffer, WatchedBuffer):
            buffer.watch.leave_to_parent()


atexit.register(destroy_buffers)
os.register_at_fork(after_in_child=_leave_to_parent)
