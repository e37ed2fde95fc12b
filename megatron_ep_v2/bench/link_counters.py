"""Bytes that really crossed the links: NVLink counters of a GPU through NVML, port counters of RDMA and EFA devices.

Counters run from the start of the driver and count all traffic: take the difference of two readings, on a
machine that does nothing else.
"""

from __future__ import annotations

from pathlib import Path

import torch

# nvml.h: field ids of the sum of data sent and received over NVLink, in KiB; scope 0xFFFFFFFF adds up all links.
_NVLINK_FIELDS = {"nvlink_tx_bytes": 138, "nvlink_rx_bytes": 139}
_ALL_LINKS = 0xFFFFFFFF
_INFINIBAND = Path("/sys/class/infiniband")


def read() -> tuple[dict[str, int], str]:
    """Counters of the current CUDA device and of this host's network devices.

    Returns:
        `(bytes by counter, reason)`: a counter that cannot be read is missing, and the reason says why NVLink's are.
    """
    counters, reason = _read_nvlink()
    counters.update(_read_infiniband())
    return counters, reason


def difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Bytes between two readings, for the counters that both have."""
    return {name: after[name] - before[name] for name in after if name in before}


def _read_nvlink() -> tuple[dict[str, int], str]:
    if not torch.cuda.is_available():
        return {}, "no CUDA device"
    try:
        import pynvml
    except ImportError:
        return {}, "the nvidia-ml-py package is not installed"
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        values = pynvml.nvmlDeviceGetFieldValues(device, [(field, _ALL_LINKS) for field in _NVLINK_FIELDS.values()])
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return {}, f"NVML: {error}"
    counters = {
        name: int(value.value.ullVal) * 1024
        for name, value in zip(_NVLINK_FIELDS, values, strict=True)
        if value.nvmlReturn == pynvml.NVML_SUCCESS
    }
    return counters, "" if counters else f"NVML: the counters answer with code {values[0].nvmlReturn}"


def _read_infiniband() -> dict[str, int]:
    """port_xmit_data and port_rcv_data count 4-byte words (InfiniBand specification); EFA's tx_bytes count bytes."""
    files = {
        ("rdma_tx_bytes", 4): "ports/*/counters/port_xmit_data",
        ("rdma_rx_bytes", 4): "ports/*/counters/port_rcv_data",
        ("efa_tx_bytes", 1): "ports/*/hw_counters/tx_bytes",
        ("efa_rx_bytes", 1): "ports/*/hw_counters/rx_bytes",
    }
    counters = {}
    for (name, unit), pattern in files.items():
        values = [int(path.read_text()) for path in _INFINIBAND.glob(f"*/{pattern}")]
        if values:
            counters[name] = unit * sum(values)
    return counters
