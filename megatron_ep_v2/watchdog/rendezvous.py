"""The rendezvous before a group's first collective: the addresses of the ranks' watchers, and the ranks that are
late."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import secrets
import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ep_v2.watchdog.watcher import Address

logger = logging.getLogger("megatron_ep_v2")


class Rendezvous:
    """One rank's part in the rendezvous of its group.

    Args:
        group: Process group.
        seconds: The watchdog's limit; 0 = no watchdog.

    Attributes:
        address: Of this rank's watcher; None without a watchdog.
        listener: The socket of that address.
    """

    def __init__(self, group: ProcessGroup, seconds: float):
        self.group, self.seconds = group, seconds
        self.address: Address | None = None
        if seconds and group.size() > 1:
            try:
                self.listener, address = _listen(group)
                self.address = (address, self.listener.getsockname()[1], secrets.token_hex(8))
            except OSError as error:
                logger.warning("rank %d has no watchdog, because it cannot listen: %s", dist.get_rank(), error)

    def await_everyone(self) -> None:
        """Wait on the host for all ranks. After the limit, log the absent ones and return; the collective then waits
        for them. (There are no watchers yet.)"""
        rank, ranks = dist.get_rank(), dist.get_process_group_ranks(self.group)
        store, prefix = self.group.get_group_store(), f"megatron_ep_v2/{self.group.group_name}/first dispatch"
        number = (store.add(prefix, 1) - 1) // len(ranks)  # no rank enters the next rendezvous before this one ends
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


def _listen(group: ProcessGroup) -> tuple[socket.socket, str]:
    """A listening socket, and the address or name by which the group's other hosts reach it.

    The address is the one from which this host reaches the group's store. If that is a loopback address (Debian has
    127.0.1.1 for a host's own name in /etc/hosts), other hosts cannot use it. But they reach the store by its name, so
    the name is returned, and the socket listens on all addresses.
    """
    store = group.get_group_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    host = store.host if isinstance(store, dist.TCPStore) else "localhost"
    for family, kind, _, _, target in socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(target)  # UDP: sends nothing, only chooses the route
            address = probe.getsockname()[0]
            if _is_loopback(address) and not _is_loopback(host):
                return _listen_everywhere(), host
            return socket.create_server((address, 0), family=family, backlog=1024), address
    raise OSError(f"no address of this host reaches {host}")


def _is_loopback(host: str) -> bool:
    """Whether a host is a loopback address or one of loopback's usual names; other names are not resolved."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # a name
        return host.partition(".")[0] in ("localhost", "ip6-localhost")


def _listen_everywhere() -> socket.socket:
    """A socket that listens on all addresses, on IPv6 too if this host has it."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)
