"""Before a group's first collective: where its ranks' watchers will answer, and who does not come."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist

logger = logging.getLogger("megatron_ep_v2")


class Meeting:
    """One rank's part in the first dispatch of its group.

    Args:
        group: Process group.
        seconds: The watchdog's limit; 0 = no watchdog.

    Attributes:
        address: Where this rank's watcher will answer: (address, port, token). None without a watchdog.
        listener: The socket of that address.
    """

    def __init__(self, group: Any, seconds: float):
        self.group, self.seconds = group, seconds
        self.address: tuple[str, int, str] | None = None
        if seconds and group.size() > 1:
            try:
                self.listener = _listen(group)
                self.address = (*self.listener.getsockname()[:2], secrets.token_hex(8))
            except OSError as error:
                logger.warning("rank %d has no watchdog, because it cannot listen: %s", dist.get_rank(), error)

    def await_everyone(self) -> None:
        """Wait for all ranks on the host; after the limit, name those that did not come, and go on to wait in the
        collective. (There are no watchers yet.)"""
        rank, ranks = dist.get_rank(), dist.get_process_group_ranks(self.group)
        store, prefix = self.group.get_group_store(), f"megatron_ep_v2/{self.group.group_name}/first dispatch"
        number = (store.add(prefix, 1) - 1) // len(ranks)  # nobody comes to the next meeting before this one is over
        keys = {member: f"{prefix}/{number}/{member}" for member in ranks}
        store.set(keys[rank], "here")
        if not self.seconds:
            return
        try:
            store.wait(list(keys.values()), timedelta(seconds=self.seconds))
        except RuntimeError:  # a time-out is DistStoreError on TCP and a plain RuntimeError on files
            absent = [member for member, key in keys.items() if not store.check([key])]
            logger.warning(
                "watchdog, rank %d: the first dispatch of the group waits for rank(s) %s, for %g s so far",
                rank,
                absent,
                self.seconds,
            )


def _listen(group: Any) -> socket.socket:
    """A listening socket on the address from which this host reaches the group's store."""
    store = group.get_group_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    host = store.host if isinstance(store, dist.TCPStore) else "localhost"
    for family, kind, _, _, target in socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing: the kernel only chooses the way
            return socket.create_server((probe.getsockname()[0], 0), family=family, backlog=1024)
    raise OSError(f"no address of this host reaches {host}")
