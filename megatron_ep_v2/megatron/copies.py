"""`copy.deepcopy` and `pickle` of this package's parts of a MoE layer.

torch neither copies nor pickles a process group, so both raise a TypeError for every MoE layer of Megatron, whatever
its dispatcher: its router and its experts hold groups. To copy a layer, pass the groups to deepcopy, which then shares
them:

    copy.deepcopy(layer, {id(group): group for group in groups})

The parts of this package share their groups by themselves, and raise an explained error when pickled.
"""

from __future__ import annotations

import copy
from typing import SupportsIndex, TypeVar

from torch.distributed import ProcessGroup

from megatron_ep_v2.errors import EPError

T = TypeVar("T")


def deepcopy_sharing_groups(part: T, memo: dict[int, object]) -> T:
    """`__deepcopy__` that shares process groups in the object's attributes and copies the other attributes."""
    memo |= {id(value): value for value in vars(part).values() if isinstance(value, ProcessGroup)}
    copied = memo[id(part)] = object.__new__(type(part))
    state = copy.deepcopy(vars(part), memo)
    set_state = getattr(copied, "__setstate__", vars(copied).update)  # torch modules define it
    set_state(state)
    return copied


def shallow_copy(part: T) -> T:
    """`__copy__` of such an object, which else would go through `refuse_to_pickle_groups`."""
    copied = object.__new__(type(part))
    vars(copied).update(vars(part))
    return copied


def refuse_to_pickle_groups(part: object, protocol: SupportsIndex) -> str | tuple[object, ...]:
    """`__reduce_ex__` that refuses to pickle an object with process groups in its attributes.

    Raises:
        EPError: An attribute is a plain torch ProcessGroup; subclasses may define how they are pickled.
    """
    held = [name for name, value in vars(part).items() if type(value) is ProcessGroup]
    if held:
        raise EPError(
            f"{type(part).__name__} of a MoE layer cannot be pickled",
            found=f"process groups of this job in its attributes {', '.join(held)}",
            needed="objects that are valid in another process, such as the model's state_dict()",
            fix="save and send state_dict(), and build the layer in the other process",
        )
    return object.__reduce_ex__(part, protocol)
