"""Whether a V2 buffer is built with NCCL GIN, the device-side RDMA that carries tokens between hosts.

DeepEP asserts that GIN is there, even on one host, unless EP_DISABLE_GIN is set while a buffer is built.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from megatron_ep_v2.errors import UnavailableError
from megatron_ep_v2.generations import Generation, install_command
from megatron_ep_v2.settings import Settings, gin_disabled_by_user

RDMA_DEVICES = Path("/sys/class/infiniband")
MELLANOX, AMAZON = "0x15b3", "0x1d0f"  # PCI vendors: of ConnectX, which GDAKI drives, and of EFA


def rdma_vendors(folder: Path | None = None) -> list[str]:
    """PCI vendor of each RDMA device of this host, e.g. "0x15b3"; "" where it cannot be read."""
    folder = folder or RDMA_DEVICES
    devices = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [device / "device" / "vendor" for device in devices]
    return [file.read_text().strip() if file.is_file() else "" for file in files]


def off_by_user(settings: Settings) -> str | None:
    """Why the user wants a buffer without GIN: the setting, or DeepEP's own variable; None = the user does not."""
    if settings.gin == "off":
        return f"gin=off by {settings.source('gin')}"
    if settings.gin == "auto" and gin_disabled_by_user():
        return "EP_DISABLE_GIN was set when the job started"
    return None


def usable(vendors: Sequence[str], generation: Generation) -> list[str]:
    """Those of these vendors whose devices a generation can send through."""
    return [vendor for vendor in vendors if vendor == MELLANOX or not generation.gin_needs_gdaki]


def choose(
    settings: Settings, vendors: Sequence[str], hosts: Sequence[str], generation: Generation
) -> tuple[bool, str]:
    """Whether to set EP_DISABLE_GIN, and why.

    Args:
        settings: The settings in force; `gin` by name is obeyed.
        vendors: Of this host's RDMA devices (`rdma_vendors`).
        hosts: Host name of each rank of the group.
        generation: Of the buffer.

    Raises:
        UnavailableError: The group spans hosts, and this one has no device that can carry the tokens. With gin=on only
            if it has others: a container may hide them all.
    """
    if reason := off_by_user(settings):
        return True, reason
    can_send = usable(vendors, generation)
    if len(set(hosts)) > 1 and not can_send and (vendors or settings.gin == "auto"):
        raise _unreachable(vendors, hosts, generation)
    if settings.gin == "on":
        return False, f"gin=on by {settings.source('gin')}"
    if can_send:
        return False, "RDMA devices are present"
    lacking = f"no RDMA device that DeepEP {generation.name} can use" if vendors else "no RDMA device"
    return True, f"all ranks are on one host, and it has {lacking}: NVLink alone carries the tokens"


def _unreachable(vendors: Sequence[str], hosts: Sequence[str], generation: Generation) -> UnavailableError:
    here, names = socket.gethostname(), sorted(set(hosts))
    if not vendors:
        return UnavailableError(
            f"the expert-parallel group spans {len(names)} hosts, but {here} has no RDMA device",
            found=f"hosts {names}; {RDMA_DEVICES} is empty",
            needed="NCCL GIN over RDMA between hosts",
            fix="install the fabric's driver (OFED, or EFA with aws-ofi-nccl), or keep expert parallelism inside one "
            "host",
        )
    found = "EFA" if AMAZON in vendors else f"RDMA devices of the vendors {sorted(set(vendors))}"
    return UnavailableError(
        f"the expert-parallel group spans {len(names)} hosts, and DeepEP {generation.name} cannot use the RDMA devices "
        f"of {here}",
        found=f"hosts {names}; {found}",
        needed="NVIDIA (Mellanox) devices: this generation reaches the network through NCCL's GDAKI only",
        fix=f"stay on DeepEP 2.1 ({install_command('2.1')}), or keep expert parallelism inside one host",
    )
