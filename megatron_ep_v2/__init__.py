"""DeepEP V2 under Megatron-Core's flex token dispatcher, with Megatron unchanged.

    import megatron_ep_v2
    megatron_ep_v2.install()          # before the model is built

Importing this package does nothing: no deep_ep, no Megatron, no CUDA, no environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from megatron_ep_v2.megatron.expert_load import Overload
    from megatron_ep_v2.watchdog.stragglers import Stragglers

__version__ = "0.1.0"
__all__ = [
    *("destroy_buffers", "expert_load", "install", "log_expert_load"),
    *("moe_submodules", "overload", "status", "stragglers", "uninstall"),
]

T = TypeVar("T")


def install(**settings: bool | float | str | None) -> dict[str, object]:
    """Bind this package to Megatron-Core; see `megatron.binding.install`."""
    from megatron_ep_v2.megatron import binding

    return binding.install(**settings)


def moe_submodules(submodules: T) -> T:
    """Call `install()` and return Megatron's MoESubmodules with the installed experts. A patched Megatron calls
    this."""
    from megatron_ep_v2.megatron import binding

    return binding.moe_submodules(submodules)


def uninstall() -> None:
    """Undo `install()`; see `megatron.binding.uninstall`."""
    from megatron_ep_v2.megatron import binding

    binding.uninstall()


def status() -> dict[str, object]:
    """Report what is installed and active, as JSON-able values; see `megatron.binding.status`."""
    from megatron_ep_v2.megatron import binding

    return binding.status()


def destroy_buffers() -> None:
    """Destroy all expert-parallel buffers of this process; see `buffers.pool.destroy_buffers`."""
    from megatron_ep_v2.buffers import pool

    pool.destroy_buffers()


def stragglers(group: ProcessGroup | None = None) -> Stragglers:
    """Report which rank arrives last at dispatches, and how late. Collective; see `watchdog.stragglers.stragglers`."""
    from megatron_ep_v2.watchdog import stragglers

    return stragglers.stragglers(group)


def expert_load() -> list[torch.Tensor]:
    """Read the tokens per expert since the last call, by MoE layer. Collective; see `megatron.expert_load`."""
    from megatron_ep_v2.megatron import expert_load

    return expert_load.expert_load()


def overload() -> list[Overload]:
    """Read how much more than the mean the busiest rank received since the last call, by MoE layer. Collective, a
    reading as `expert_load()`; see `megatron.expert_load.overload`."""
    from megatron_ep_v2.megatron import expert_load

    return expert_load.overload()


def log_expert_load(iteration: int) -> dict[str, float]:
    """Write the expert load and the overload as scalars to Megatron's loggers. Collective; see
    `megatron.expert_load.log_expert_load`."""
    from megatron_ep_v2.megatron import expert_load

    return expert_load.log_expert_load(iteration)
