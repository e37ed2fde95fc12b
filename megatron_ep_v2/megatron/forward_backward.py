"""Megatron's forward and backward in sync-free mode: where more rows arrive than their experts have room for, the same
micro-batches run again with more room, before Megatron's loop goes on.

`install()` binds the schedules of `megatron.core.pipeline_parallel.schedules`. After each of them, and not first before
the optimizer's step, all ranks of the model read their device checks, and decide together: all repeat, or none. Not
repeated, so that the error is raised where other layouts raise theirs:

- an evaluation, which makes room for all rows that arrive;
- in a capture, where nothing can be read: `full_cuda_graph` reads after the replay;
- gradients that the schedule does not finalize (`finalize_model_grads_func` is None): other calls may have added to
  them; those of other wrappers than Megatron's DistributedDataParallel; and those whose memory the parameters share
  (`reuse_grad_buf_for_mxfp8_param_ag`);
- jobs without Megatron's parallel_state: which ranks step together is then unknown.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config
from torch.distributed import ProcessGroup

from megatron_ep_v2 import device_checks, sync_free
from megatron_ep_v2.errors import EvaluationOverflowError, LayoutOverflowError
from megatron_ep_v2.megatron.optimizer_step import read_together
from megatron_ep_v2.megatron.step_state import MicroBatches, StepState
from megatron_ep_v2.megatron.symbols import Binding

logger = logging.getLogger("megatron_ep_v2")

_SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_pipelining_without_interleaving",
)


def bindings(schedules: ModuleType) -> list[Binding]:
    """(module, name, our function) for each schedule."""
    return [(schedules, name, repeating(getattr(schedules, name))) for name in _SCHEDULES]


def repeating(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a schedule to repeat a step that has overflowed. Arguments and result are the schedule's.

    Raises:
        EPError: See `run_until_it_fits`.
    """

    @functools.wraps(schedule)
    def forward_backward(*args: Any, **call: Any) -> Any:
        if args or capturing() or not all_can_repeat(call):
            return schedule(*args, **call)
        return run_until_it_fits(schedule, call)

    return forward_backward


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# Of a model's first chunk: what all ranks have agreed on, for calls that finalize the gradients and for others. Not by
# what this rank said: where one rank never can, the others' answer changes alone, and they would vote without it.
_agreed: weakref.WeakKeyDictionary[torch.nn.Module, dict[bool, bool]] = weakref.WeakKeyDictionary()


def all_can_repeat(call: dict[str, Any]) -> bool:
    """Whether every rank of the model can repeat this call: only then do they read their checks after it. The first
    call for a model of each kind, with gradients finalized or not, is collective: a rank may hold a part that is not
    wrapped, such as a frozen encoder."""
    mine = can_repeat(call)
    if call.get("forward_only") or not parallel_state.model_parallel_is_initialized():
        return mine
    first = chunks_of(call)[0]
    answers, finalizes = _agreed.setdefault(first, {}), get_model_config(first).finalize_model_grads_func is not None
    if finalizes not in answers:
        answers[finalizes] = not device_checks.largest(not mine, *_ranks_of_the_model())
    return answers[finalizes]


def _ranks_of_the_model() -> tuple[ProcessGroup, ProcessGroup]:
    """Groups that, reduced over in turn, reach every rank."""
    return (
        parallel_state.get_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def can_repeat(call: dict[str, Any]) -> bool:
    """Whether this rank can repeat a call of a schedule, if it overflows: see the module."""
    if not parallel_state.model_parallel_is_initialized():
        return False
    if call.get("forward_only"):
        return torch.is_grad_enabled()  # without gradients it makes room for all rows
    chunks = chunks_of(call)
    # Of all configurations a schedule reads the first chunk's.
    return get_model_config(chunks[0]).finalize_model_grads_func is not None and all(
        isinstance(chunk, DistributedDataParallel)
        and not getattr(chunk.ddp_config, "reuse_grad_buf_for_mxfp8_param_ag", False)
        for chunk in chunks
    )


def chunks_of(call: dict[str, Any]) -> list[Any]:
    """The model chunks of a call of a schedule."""
    model = call["model"]
    return list(model) if isinstance(model, (list, tuple)) else [model]


def run_until_it_fits(
    run: Callable[..., Any], call: dict[str, Any], before_repeat: Callable[[], None] = lambda: None
) -> Any:
    """Call `run`, and again with more room and all else as it was before, until no rank of the model has an overflow.

    Args:
        run: A schedule.
        call: Its keyword arguments.
        before_repeat: Called before each repeat, after the state has been set back.

    Returns:
        Of the last call.

    Raises:
        LayoutOverflowError: The micro-batches cannot be taken a second time; or it is an evaluation's, by training.
        EPError: Any other error of a device check; see `device_checks.read_all`.
    """
    state, micro_batches = StepState(chunks_of(call)), MicroBatches(call["data_iterator"])
    while True:
        result = run(**{**call, "data_iterator": micro_batches.data_iterator})
        try:
            read_together()
            return result
        except LayoutOverflowError as error:
            if isinstance(error, EvaluationOverflowError) and not call.get("forward_only"):
                raise
            _refuse_unknown(micro_batches, error)
            grown = sync_free.grow()
            _log_repeat(error, grown)
        del result
        state.restore()
        micro_batches.rewind()
        if not call.get("forward_only"):
            _zero_gradients(chunks_of(call))
        before_repeat()


def _refuse_unknown(micro_batches: MicroBatches, error: LayoutOverflowError) -> None:
    """Raise the error on every rank if one rank's micro-batches cannot be taken a second time."""
    if micro_batches.unknown is not None:
        error.add_note(f"not repeated: a {micro_batches.unknown} as data_iterator cannot be set back")
    device_checks.raise_together(error if micro_batches.unknown is not None else None, *_ranks_of_the_model())


def _zero_gradients(chunks: list[DistributedDataParallel]) -> None:
    """As Megatron's loop does before a step. Reductions are finished: `finalize_model_grads` waits for them."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.grad = None


def _log_repeat(error: LayoutOverflowError, grown: list[int]) -> None:
    """Say it once for each expert-parallel group that has overflowed."""
    if grown and parallel_state.get_expert_tensor_and_model_parallel_group().rank() == 0:
        percent = ", ".join(map(str, grown))
        logger.warning("sync-free: a step runs again, because %s; room for %s percent now", error.found, percent)
