"""Megatron's CUDA graph of a whole forward and backward (`FullCudaGraphWrapper`) in sync-free mode.

It keeps the room that it was captured with. So it is captured with what the steps before have needed, and where a
replay overflows, the graph is dropped, the step runs again eagerly, with more room, and the wrapper captures again
after its warm-up steps. It also keeps the shapes and the number of micro-batches that it was captured with:

- Another number of micro-batches, or another sequence length or micro-batch size in the call, is equal on all ranks:
  the wrapper captures again.
- A micro-batch of another shape, on any rank, is refused before the optimizer's step, on every rank of the model.
"""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader

from megatron_ep_v2 import graphs, settings, sync_free
from megatron_ep_v2.device_checks import DeviceCheck
from megatron_ep_v2.errors import InputError
from megatron_ep_v2.megatron.forward_backward import all_can_repeat, chunks_of, run_until_it_fits
from megatron_ep_v2.megatron.optimizer_step import read_together
from megatron_ep_v2.megatron.symbols import Binding

logger = logging.getLogger("megatron_ep_v2")

_SIZES = ("num_microbatches", "seq_length", "micro_batch_size", "decoder_seq_length")  # of a call
_sizes: dict[str, tuple[Any, ...]] = {}  # by stage: of the last call; Megatron keeps the graphs in the class, too


def bindings(module: ModuleType) -> list[Binding]:
    """(class, name, our function).

    Args:
        module: `megatron.core.full_cuda_graph`.
    """
    wrapper = module.FullCudaGraphWrapper
    return [(wrapper, "__call__", repeating(wrapper.__call__))]


def repeating(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of Megatron's wrapper. Arguments and result are its own.

    Raises:
        InputError: A micro-batch of another shape than those before it.
        EPError: See `forward_backward.run_until_it_fits`.
    """

    @functools.wraps(theirs)
    def forward_backward(self: FullCudaGraphWrapper, *args: Any, **call: Any) -> Any:
        if args or not parallel_state.model_parallel_is_initialized():
            return theirs(self, *args, **call)
        graphs.register(_KEEPER)  # not with the bindings, which a forked rank inherits: it has forgotten all keepers
        stage = "validation" if call.get("forward_only") else "training"
        sizes = tuple(call.get(name) for name in _SIZES)
        if _sizes.setdefault(stage, sizes) != sizes:
            _start_again(stage, sizes)
        shapes = _Shapes(stage, next(chunks_of(call)[0].parameters()).device)

        def run(**call: Any) -> Any:
            captures = stage == "training" and self.curr_iter(stage) == self.cuda_graph_warmup_steps
            if captures and settings.active().sync_free_rows_percent:  # 0 has room for all that could arrive
                sync_free.fit()
            return theirs(self, **{**call, "data_iterator": shapes.checked(call["data_iterator"])})

        if stage == "validation" or all_can_repeat(call):
            return run_until_it_fits(run, call, functools.partial(_drop_graph, stage))
        result = run(**call)
        read_together()
        return result

    return forward_backward


def _drop_graph(stage: str) -> None:
    """The next steps of this stage run eagerly, and then it is captured again."""
    if FullCudaGraphWrapper.cuda_graph[stage] is not None:
        FullCudaGraphWrapper.cuda_graph[stage] = FullCudaGraphWrapper.result[stage] = None
        FullCudaGraphWrapper.curr_iteration[stage] = 0
        gc.collect()  # its memory, which the step that follows wants


class _Keeper:
    """Of the graphs of all stages, which Megatron keeps in the class until the process ends."""

    def drop(self) -> None:
        for stage in list(FullCudaGraphWrapper.cuda_graph):
            _drop_graph(stage)
            FullCudaGraphWrapper.curr_iteration[stage] = 0  # also after the warm-up: the next step builds the buffers


_KEEPER = _Keeper()


def _start_again(stage: str, sizes: tuple[Any, ...]) -> None:
    """Warm-up steps and a capture with other sizes."""
    before, now = (dict(zip(_SIZES, values, strict=True)) for values in (_sizes[stage], sizes))
    logger.info("sync-free: a CUDA graph was for %s; the %s step has %s, and is captured again", before, stage, now)
    _sizes[stage] = sizes
    _drop_graph(stage)
    FullCudaGraphWrapper.curr_iteration[stage] = 0  # deep_ep and Triton compile for new sizes, outside a capture
    StaticBufferLoader.static_buffers[stage].clear()


class _Shapes:
    """Compares the micro-batches of a step with the memory that Megatron copies them into. One with another shape is
    not copied: the step runs with the one before, and a device check raises on every rank.

    Args:
        stage: training or validation.
        device: Of the model.
    """

    def __init__(self, stage: str, device: torch.device):
        self.buffers = StaticBufferLoader.static_buffers[stage]
        self._found: list[str] = []
        # Not a method of this object: the circle would keep the check of a step that was given up until Python collects
        # it, on some ranks longer than on others, and reads are collective.
        to_error = functools.partial(_to_error, self._found)
        self._check = DeviceCheck(to_error, device, parallel_state.get_expert_tensor_and_model_parallel_group())

    def checked(self, data_iterator: Any) -> Any:
        """The same micro-batches, in the same structure: an iterator, None or a list."""
        self._check.touch()
        if isinstance(data_iterator, list):
            return [None if source is None else self._check_each(source) for source in data_iterator]
        return None if data_iterator is None else self._check_each(data_iterator)

    def _check_each(self, source: Iterator[Any]) -> Iterator[Any]:
        for number, item in enumerate(source):
            inputs = item[0] if isinstance(item, tuple) and isinstance(item[0], dict) else item
            before = self.buffers[number] if number < len(self.buffers) else inputs
            if _shapes(inputs) == _shapes(before):
                yield item
            else:
                self._found[:] = [f"{_shapes(inputs)} after {_shapes(before)}"]
                self._check.add(torch.ones(1, dtype=torch.int32, device=self._check.count.device))
                yield before


def _to_error(found: list[str], counts: dict[int, int]) -> InputError:
    """found: On this rank, one or none."""
    return InputError(
        "a micro-batch has another shape than those before it, whose memory a CUDA graph of the whole step reads",
        found=f"{(found or ['on another rank'])[0]}; on rank(s) {sorted(counts)} of the expert-parallel group",
        needed="the same tensors of the same shapes in every micro-batch, on this rank",
        fix="pad all micro-batches to one length, or turn Megatron's full-iteration CUDA graph off",
    )


def _shapes(value: Any) -> Any:
    """The shapes of all tensors, in the same dicts and lists."""
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    if isinstance(value, dict):
        return {key: shape for key, inner in value.items() if (shape := _shapes(inner)) is not None}
    if isinstance(value, (list, tuple)):
        return [_shapes(inner) for inner in value]
    return None
