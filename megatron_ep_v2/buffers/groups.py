"""The process group that a buffer is built on, if the caller's group only forwards to another.

RL trainers that offload give Megatron groups of a subclass of `ProcessGroup`. It holds a real group in an attribute,
destroys it while the rollout runs, and creates another one afterwards. It forwards rank and size; but torch.distributed
registers only the real group, with the name, store and communicator that a buffer needs.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2.errors import ClosedError


def registered(group: ProcessGroup) -> ProcessGroup:
    """The process group that torch.distributed knows.

    Args:
        group: A process group; or an instance of a subclass of `ProcessGroup` with that group in an attribute.

    Returns:
        `group` itself, or the one that it forwards to. A plain group is returned even if it was destroyed: its use
        raises then.

    Raises:
        ClosedError: No attribute, or more than one, holds a group that torch.distributed knows.
    """
    if is_registered(group) or type(group) is ProcessGroup or not isinstance(group, ProcessGroup):
        return group
    held = _held(group)
    if len(held) == 1:
        return next(iter(held.values()))
    kind = type(group).__name__
    groups = [name for name, value in _attributes(group).items() if isinstance(value, ProcessGroup)]
    found = (
        f"{len(held)} of its attributes hold one: {', '.join(held)}"
        if held
        else f"of its attributes only {', '.join(groups)} holds a group, which was destroyed"
        if groups
        else f"none of its attributes holds a group ({', '.join(_attributes(group)) or 'it has none'})"
    )
    raise ClosedError(
        f"a process group of class {kind} leads to no group that torch.distributed knows",
        found=found,
        needed="one attribute with a group of torch.distributed.new_group(), which is not destroyed",
        fix=f"reload the groups that {kind} offloads before the model runs, or pass the group that it holds",
    )


def find_registered(group: ProcessGroup) -> ProcessGroup | None:
    """`registered(group)`, or None where it raises."""
    try:
        return registered(group)
    except ClosedError:
        return None


def is_registered(group: ProcessGroup) -> bool:
    """Whether torch.distributed has registered this object. Reads its private table, because frameworks with their own
    groups replace its public functions."""
    return group in dist.distributed_c10d._world.pg_map


def _attributes(group: ProcessGroup) -> dict[str, object]:
    return getattr(group, "__dict__", {})


def _held(group: ProcessGroup) -> dict[str, ProcessGroup]:
    """Attribute -> group that torch.distributed knows; each group once."""
    by_group = {
        value: name
        for name, value in _attributes(group).items()
        if isinstance(value, ProcessGroup) and is_registered(value)
    }
    return {name: value for value, name in by_group.items()}
