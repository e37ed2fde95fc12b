"""Copies of what a MoE layer holds of this package, by `copy.deepcopy` and `pickle`.

torch neither copies nor pickles a process group, so both raise a TypeError for every MoE layer of Megatron, whatever
its dispatcher: its router and its experts hold groups. Who wants a copy of a layer gives the groups to deepcopy, which
then shares them:

    copy.deepcopy(layer, {id(group): group for group in groups})

The parts of this package share their groups by themselves, and say it where one cannot be pickled.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch.distributed import ProcessGroup

from megatron_ep_v2.errors import EPError

T = TypeVar("T")


def deepcopy_sharing_groups(part: T, memo: dict[int, Any]) -> T:
    """`__deepcopy__` of an object whose attributes are process groups, which the copy shares, and things to copy."""
    memo |= {id(value): value for value in vars(part).values() if isinstance(value, ProcessGroup)}
    copied = memo[id(part)] = object.__new__(type(part))
    state = copy.deepcopy(vars(part), memo)
    set_state = getattr(copied, "__setstate__", vars(copied).update)  # a module has its own
    set_state(state)
    return copied


def shallow_copy(part: T) -> T:
    """`__copy__` of such an object, which else would go through `refuse_to_pickle_groups`."""
    copied = object.__new__(type(part))
    vars(copied).update(vars(part))
    return copied


def refuse_to_pickle_groups(part: Any, protocol: Any) -> Any:
    """`__reduce_ex__` of such an object.

    Raises:
        EPError: It holds a process group of torch's; a subclass may know how it is pickled.
    """
    held = [name for name, value in vars(part).items() if type(value) is ProcessGroup]
    if held:
        raise EPError(
            f"{type(part).__name__} of a MoE layer cannot be pickled",
            found=f"process groups of this job in its attributes {', '.join(held)}",
            needed="what does not belong to one process: the state_dict() of the model",
            fix="save and send state_dict(), and build the layer on the other side",
        )
    return object.__reduce_ex__(part, protocol)
