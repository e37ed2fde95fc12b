"""CUDA graphs that must end before the buffers and process groups that they use.

A replay of a graph whose buffer was destroyed writes to memory that is another's. And NCCL does not destroy a
communicator as long as a graph holds one of its collectives: it waits without an end (`commDestroySync` in NCCL 2.30.7,
src/init.cc). So who keeps such graphs registers here, and `destroy_buffers()` drops them; after `install()`, so does
`torch.distributed.destroy_process_group()` of the world, or of a group that has a buffer. A group without one may be of
some ranks only, as the groups by which RL frameworks send weights, and all ranks have to replay alike.
"""

from __future__ import annotations

import weakref
from typing import Protocol


class Keeper(Protocol):
    """What keeps captured graphs."""

    def drop(self) -> None:
        """Forget them all. What needs one later captures it again."""


_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


def register(keeper: Keeper) -> None:
    """Have a keeper drop its graphs in time, as long as it is alive."""
    _keepers.add(keeper)


def forget_keepers() -> None:
    """In a forked child, which must not touch its parent's graphs."""
    _keepers.clear()


def drop_all() -> None:
    """Drop the graphs of all keepers. Not collective, but a replay is: on every rank, or on none."""
    for keeper in list(_keepers):
        keeper.drop()
