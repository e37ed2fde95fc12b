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
    """Bind this package to Megatron-Core; see `megatron.binding.install`."""
    from megatron_ep_v2.megatron import binding

    return binding.install(**settings)


def moe_submodules(submodules: Any) -> Any:
    """`install()`, and Megatron's MoESubmodules with the experts that are installed: what a patched Megatron calls."""
    from megatron_ep_v2.megatron import binding

    return binding.moe_submodules(submodules)


def uninstall() -> None:
    """Undo `install()`; see `megatron.binding.uninstall`."""
    from megatron_ep_v2.megatron import binding

    binding.uninstall()


def status() -> dict[str, Any]:
    """What is installed and active, as JSON-able values; see `megatron.binding.status`."""
    from megatron_ep_v2.megatron import binding

    return binding.status()


def destroy_buffers() -> None:
    """Destroy all expert-parallel buffers of this process; see `buffers.pool.destroy_buffers`."""
    from megatron_ep_v2.buffers import pool

    pool.destroy_buffers()


def stragglers(group: Any = None) -> Any:
    """Which rank arrives last at its dispatches, and by how much. Collective; see `watchdog.stragglers.stragglers`."""
    from megatron_ep_v2.watchdog import stragglers

    return stragglers.stragglers(group)


def expert_load() -> Any:
    """Tokens of each expert since the last reading, by MoE layer. Collective; see `megatron.expert_load`."""
    from megatron_ep_v2.megatron import expert_load

    return expert_load.expert_load()


def log_expert_load(iteration: int) -> dict[str, float]:
    """The same as scalars, written to Megatron's loggers. Collective; see `megatron.expert_load.log_expert_load`."""
    from megatron_ep_v2.megatron import expert_load

    return expert_load.log_expert_load(iteration)
