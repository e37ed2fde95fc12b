"""Megatron's options to run something next to the communication, and what the log says of each."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)

SHARED, PLAN = "moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm"
WGRAD = "overlap_dispatch_backward_with_experts_wgrad"
# What is logged: with calls that are started, and without.
_OVERLAPS = {
    SHARED: (
        "dispatches and combines are started; the host launches the shared expert before it waits for the counts",
        "the host waits for the counts of a dispatch before it launches the shared expert",
    ),
    PLAN: (
        "dispatches are started; the host launches the other micro-batch's work before it waits for the counts",
        "the host waits for the counts of a dispatch before it launches the other micro-batch's work",
    ),
    WGRAD: (
        "dispatches are started; the weight gradients of megatron_ep_v2's experts run next to the backward of one",
        "the weight gradients of megatron_ep_v2's experts run before the backward of a dispatch",
    ),
}


@functools.cache
def say_overlap(option: str, not_started: str | None, waits: bool = True) -> None:
    """Log once which kind of overlap is in force.

    Args:
        option: SHARED, PLAN or WGRAD.
        not_started: Why a dispatch is not started; None = it is.
        waits: Whether the host waits in one that is not.
    """
    started, before = _OVERLAPS[option]
    before = before if waits else "dispatches are not started"
    logger.info("%s: %s", option, started if not_started is None else f"{before}, because {not_started}")
