"""Redundant experts in a buffer: what every call of `contract.RedundantBuffer` checks, and the reference's transfers.

deep_ep 2.5 checks none of this itself, and writes into another rank's memory where a slot or the mapping is wrong.
No check waits for a device: the mapping is on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.contract import Redundancy, Slots
from megatron_ep_v2.errors import InputError, SettingsError

VARIABLE = "MCORE_DEEPEP_V2_REDUNDANT_EXPERTS"
OFF = f"unset {VARIABLE}"
ALIGNMENT = 16  # bytes: what DeepEP 2.5's kernels copy and add at a time


class Replica(NamedTuple):
    """A replica slot in use."""

    rank: int
    slot: int
    home: int
    local: int  # number of the expert at its home


def replicas(mapping: torch.Tensor, num_local_experts: int) -> Iterator[Replica]:
    """The used slots of a mapping, by rank and slot."""
    for rank, experts in enumerate(mapping.tolist()):
        for slot, expert in enumerate(experts):
            if expert >= 0:
                yield Replica(rank, slot, *divmod(expert, num_local_experts))


# --------------------------------------------------------------------------------------------------------------- checks


def refuse(carrier: str, needed: str) -> SettingsError:
    """The error of a buffer that cannot move experts.

    Args:
        carrier: Its name.
        needed: Which buffer can.
    """
    return SettingsError(
        f"the {carrier} does not move redundant experts",
        found=f"redundant_experts is on; {carrier}",
        needed=needed,
        fix=f"{OFF}, or install DeepEP 2.5",
    )


def check_one_host(hosts: Sequence[str]) -> None:
    """Refuse a group over hosts.

    Args:
        hosts: Host name of each rank of the group.
    """
    if len(set(hosts)) > 1:
        raise SettingsError(
            "redundant experts move over NVLink, and this expert-parallel group spans hosts",
            found=f"ranks on {len(set(hosts))} hosts",
            needed="an expert-parallel group inside one host",
            fix=f"{OFF}, or choose --expert-model-parallel-size so that a group fits one host",
        )


def check_mapping(group: ProcessGroup, redundancy: Redundancy, mapping: torch.Tensor) -> None:
    """Check a mapping as `contract.RedundantBuffer` needs it.

    Raises:
        InputError: Its shape, dtype or device, an id that does not exist, a rank's own expert, or one expert twice on
            a rank.
    """
    shape, local = (group.size(), redundancy.num_slots), redundancy.num_local_experts
    found = ""
    if tuple(mapping.shape) != shape or mapping.dtype != torch.int32 or not mapping.is_cpu:
        found = f"{mapping.dtype} {tuple(mapping.shape)} on {mapping.device}"
    else:
        for rank, row in enumerate(mapping.tolist()):
            used = [expert for expert in row if expert != -1]
            wrong = [expert for expert in used if not 0 <= expert < group.size() * local or expert // local == rank]
            if wrong or len(set(used)) < len(used):
                found = f"rank {rank} is to hold {row}"
                break
    if found:
        raise InputError(
            f"rank {group.rank()}: this mapping of replica slots cannot be used",
            found=found,
            needed=f"int32 {shape} on the CPU: experts 0 to {group.size() * local - 1} or -1, none of a rank's own "
            f"({local} each), none twice on a rank",
            fix="pass what megatron_ep_v2.balance.planner.plan gives, its `experts`",
        )


def check_prefetch(
    group: ProcessGroup,
    redundancy: Redundancy,
    own: Slots,
    slots: Slots,
    weights: Sequence[torch.Tensor],
    mapping: torch.Tensor,
) -> None:
    """Check the arguments of `prefetch_weights`. own: The slots of the buffer that is called. Raises InputError."""
    _check_own(group, slots is own)
    wanted = [(redundancy.num_local_experts, *shape) for shape in redundancy.shapes]
    if [(tuple(w.shape), w.dtype) for w in weights] != [(shape, redundancy.dtype) for shape in wanted] or not all(
        w.is_contiguous() and w.device == slot.device for w, slot in zip(weights, slots.weights, strict=True)
    ):
        raise InputError(
            f"rank {group.rank()}: these weights do not fit the replica slots",
            found=", ".join(f"{w.dtype} {tuple(w.shape)}, strides {w.stride()}, on {w.device}" for w in weights),
            needed=f"{redundancy.dtype} {wanted}, contiguous, on {slots.weights[0].device}: one size of experts and "
            "one params_dtype for all MoE layers of a group",
            fix=f"give the model's config the dtype of its weights (params_dtype), or {OFF}",
        )
    _check_aligned(group, "weights", weights)
    check_mapping(group, redundancy, mapping)


def check_reduce(
    group: ProcessGroup,
    redundancy: Redundancy,
    own: Slots,
    slot_grads: torch.Tensor,
    grads: torch.Tensor,
    mapping: torch.Tensor,
) -> None:
    """Check the arguments of `reduce_grads`. own: As in `check_prefetch`. Raises InputError."""
    _check_own(group, any(slot_grads is each for each in own.grads))
    shape = (redundancy.num_local_experts, *slot_grads.shape[1:])
    good = tuple(grads.shape) == shape and grads.dtype == slot_grads.dtype and grads.device == slot_grads.device
    if not good or not grads.is_contiguous():
        raise InputError(
            f"rank {group.rank()}: replicas' gradients cannot be added to this tensor",
            found=f"{grads.dtype} {tuple(grads.shape)}, strides {grads.stride()}, on {grads.device}",
            needed=f"{slot_grads.dtype} {shape}, contiguous, on {slot_grads.device}",
            fix="pass the gradients of this rank's own experts in the slots' dtype",
        )
    _check_aligned(group, "gradients", [grads])
    check_mapping(group, redundancy, mapping)


def _check_aligned(group: ProcessGroup, what: str, tensors: Sequence[torch.Tensor]) -> None:
    """Refuse views into a flat buffer that begin between two multiples of ALIGNMENT."""
    odd = [f"{tuple(t.shape)} begins {t.data_ptr() % ALIGNMENT} bytes after one" for t in tensors if not is_aligned(t)]
    if odd:
        raise InputError(
            f"rank {group.rank()}: these {what} do not begin where DeepEP can copy them",
            found=", ".join(odd),
            needed=f"memory that begins at a multiple of {ALIGNMENT} bytes, as torch's own does, and as the views into "
            "the buffers of Megatron's distributed optimizer do",
            fix=f"align each parameter in the flat buffer to {ALIGNMENT} bytes, or give each its own memory; or {OFF}",
        )


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether DeepEP's kernels can copy it or add to it."""
    return tensor.data_ptr() % ALIGNMENT == 0


def _check_own(group: ProcessGroup, own: bool) -> None:
    if not own:
        raise InputError(
            f"rank {group.rank()}: these replica slots are not in this buffer's memory",
            needed="what slots() of the same buffer returns",
            fix="ask the buffer for its slots() again; a destroyed or grown buffer's are not those of a later one",
        )


# ------------------------------------------------------------------------------------------------------------- memory


def slot_bytes(redundancy: Redundancy, alignment: int = 256) -> int:
    """Bytes of all slots, each tensor at a multiple of `alignment`."""
    return sum(-(-size // alignment) * alignment for *_, size in _tensors(redundancy))


@torch.inference_mode(False)  # else inference tensors, which training cannot write to
def carve(redundancy: Redundancy, memory: torch.Tensor, alignment: int = 256) -> Slots:
    """Slots in `memory`, [slot_bytes or more] uint8."""
    found, start = [], 0
    for shape, dtype, size in _tensors(redundancy):
        found.append(memory[start : start + size].view(dtype).view(shape))
        start += -(-size // alignment) * alignment
    linears = len(redundancy.shapes)
    return Slots(weights=tuple(found[:linears]), grads=tuple(found[linears:]))


def _tensors(redundancy: Redundancy) -> Iterator[tuple[tuple[int, ...], torch.dtype, int]]:
    """(shape, dtype, bytes) of each linear's weights, then of each linear's gradients."""
    for dtype in (redundancy.dtype, redundancy.grad_dtype):
        for shape in redundancy.shapes:
            whole = torch.Size((redundancy.num_slots, *shape))
            yield tuple(whole), dtype, whole.numel() * dtype.itemsize


# ------------------------------------------------------------------------------------------- the reference's transfers


class Moved:
    """Broadcasts that have begun, and what to do with what they bring. Until the wait nothing has arrived."""

    def __init__(self, works: list[dist.Work], arrive: Callable[[], None]):
        self._works, self._arrive = works, arrive

    def wait(self) -> None:
        """See `contract.Transfer`. A second call does nothing."""
        works, self._works = self._works, []
        for work in works:
            work.wait()
        arrive, self._arrive = self._arrive, _nothing
        arrive()


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class References:
    """The transfers of the reference buffer: a broadcast for each used slot and linear, in the mapping's order.

    Attributes:
        group: Process group.
        redundancy: As the buffer was built.
    """

    group: ProcessGroup
    redundancy: Redundancy

    def prefetch(self, slots: Slots, weights: Sequence[torch.Tensor], mapping: torch.Tensor) -> Moved:
        """`prefetch_weights`; all slots are NaN until the wait, and unused ones after it."""
        me, works, arriving = self.group.rank(), [], []
        for slot in slots.weights:
            slot.fill_(float("nan"))
        for replica in replicas(mapping, self.redundancy.num_local_experts):
            for slot, w in zip(slots.weights, weights, strict=True):
                expert = w.detach()[replica.local]
                moving = expert if me == replica.home else torch.empty_like(expert)
                works.append(self._broadcast(moving, replica.home))
                if me == replica.rank:
                    arriving.append((slot[replica.slot], moving))

        def arrive() -> None:
            for target, source in arriving:
                target.copy_(source)

        return Moved(works, arrive)

    def reduce(self, slot_grads: torch.Tensor, grads: torch.Tensor, mapping: torch.Tensor) -> Moved:
        """`reduce_grads`: at its home a replica's gradient is added in the mapping's order. The slots are NaN then."""
        me, works, arriving = self.group.rank(), [], []
        for replica in replicas(mapping, self.redundancy.num_local_experts):
            mine = slot_grads[replica.slot]
            moving = mine.clone() if me == replica.rank else torch.empty_like(mine)
            works.append(self._broadcast(moving, replica.rank))
            if me == replica.home:
                arriving.append((replica.local, moving))

        def arrive() -> None:
            slot_grads.fill_(float("nan"))
            for local, grad in arriving:
                grads[local].add_(grad)

        return Moved(works, arrive)

    def _broadcast(self, tensor: torch.Tensor, rank: int) -> dist.Work:
        source = dist.get_global_rank(self.group, rank)
        work = dist.broadcast(tensor.view(torch.uint8), source, group=self.group, async_op=True)
        assert work is not None  # as for every asynchronous one on a member of the group
        return work
