"""DeepEP V2 under Megatron-Core's flex token dispatcher, with Megatron unchanged.

    import megatron_ep_v2
    megatron_ep_v2.install()          # before the model is built

Importing this package does nothing: no deep_ep, no Megatron, no CUDA, no environment.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = [
    *("destroy_buffers", "expert_load", "install", "log_expert_load"),
    *("moe_submodules", "status", "stragglers", "uninstall"),
]


def install(**settings: Any) -> dict[str, Any]:
    """Bind this package to Megatron-Core; see `installer.install`."""
    from megatron_ep_v2 import installer

    return installer.install(**settings)


def moe_submodules(submodules: Any) -> Any:
    """`install()`, and Megatron's MoESubmodules with the experts that are installed: what a patched Megatron calls."""
    from megatron_ep_v2 import installer

    return installer.moe_submodules(submodules)


def uninstall() -> None:
    """Undo `install()`; see `installer.uninstall`."""
    from megatron_ep_v2 import installer

    installer.uninstall()


def status() -> dict[str, Any]:
    """What is installed and active, as JSON-able values; see `installer.status`."""
    from megatron_ep_v2 import installer

    return installer.status()


def destroy_buffers() -> None:
    """Destroy all expert-parallel buffers of this process; see `buffers.pool.destroy_buffers`."""
    from megatron_ep_v2.buffers import pool

    pool.destroy_buffers()


def stragglers(group: Any = None) -> Any:
    """Which rank arrives last at its dispatches, and by how much. Collective; see `watchdog.arrivals.stragglers`."""
    from megatron_ep_v2.watchdog import arrivals

    return arrivals.stragglers(group)


def expert_load() -> Any:
    """Tokens of each expert since the last reading, for each MoE layer. Collective; see `load.expert_load`."""
    from megatron_ep_v2 import load

    return load.expert_load()


def log_expert_load(iteration: int) -> dict[str, float]:
    """The same as scalars, written to Megatron's loggers. Collective; see `load.log_expert_load`."""
    from megatron_ep_v2 import load

    return load.log_expert_load(iteration)
