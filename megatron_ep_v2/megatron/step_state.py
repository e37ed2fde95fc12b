"""What a forward and backward changes besides the gradients, set back so that the step can run a second time.

Routers count tokens and add up their auxiliary losses in each forward, and Megatron's `finalize_model_grads` makes of
it the next step's expert bias; Megatron's and our own logs add up values of each micro-batch; dropout draws random
numbers; and the micro-batches are taken from an iterator. Nothing here waits for the device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_ep_v2.megatron import expert_load

# Megatron's sums over the micro-batches of a step, which its loop logs and clears after it: module, object there.
_LOGS = (
    ("megatron.core.transformer.moe.moe_utils", "_MOE_LAYER_WISE_LOGGING_TRACKER"),  # auxiliary losses, before 0.19
    ("megatron.core.transformer.moe.moe_logging", "_MOE_METRICS_TRACKER"),  # from 0.19 on
    ("megatron.core.transformer.multi_token_prediction", "MTPLossLoggingHelper"),
    ("megatron.core.transformer.experimental_attention_variant.dsa", "DSAIndexerLossLoggingHelper"),
)
_LARGE = 1 << 16  # elements of a buffer that no forward accumulates into, but that would take memory to keep
_MAX_LOGITS = "current_max_attn_logits"  # of attention, for --qk-clip: replaced in each forward, not written to


class StepState:
    """The state at construction, for `restore`.

    Args:
        chunks: The model chunks of this rank.
    """

    def __init__(self, chunks: list[torch.nn.Module]):
        self._modules = [module for chunk in chunks for module in chunk.modules()]
        with torch.no_grad():
            self._sums = {key: tensor.clone() for key, tensor in self._accumulated()}
        with_logits = [module for module in self._modules if _MAX_LOGITS in vars(module)]
        self._max_logits = [(module, vars(module)[_MAX_LOGITS]) for module in with_logits]
        self._dispatches = expert_load.dispatches()
        self._random = _RandomState()

    def restore(self) -> None:
        """Set everything back, in place, because a CUDA graph may have been captured with these tensors."""
        with torch.no_grad():
            for key, tensor in self._accumulated():
                if key in self._sums:
                    tensor.copy_(self._sums[key])
                else:  # its first value came in this step
                    tensor.zero_()
        for module, value in self._max_logits:
            setattr(module, _MAX_LOGITS, value)
        expert_load.set_dispatches(self._dispatches)
        self._random.restore()

    def _accumulated(self) -> Iterator[tuple[object, torch.Tensor]]:
        """(key, tensor) of everything that a forward may add to."""
        for number, module in enumerate(self._modules):
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.numel() <= _LARGE:
                    yield (number, name), buffer
        for module_name, name in _LOGS:
            yield from _tensors(getattr(sys.modules.get(module_name), name, None), name)
        yield from expert_load.counters().items()


def _tensors(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of all tensors in dicts, and in Megatron's objects and classes."""
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if not isinstance(value, dict):
        kind = value if isinstance(value, type) else type(value)
        if not kind.__module__.startswith("megatron.core"):
            return
        value = dict(vars(value))
    for key, inner in value.items():
        yield from _tensors(inner, f"{path}.{key}")


class _RandomState:
    """The state of the generators that Megatron's models draw from."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        # Read as an attribute: Megatron's function for it would make one.
        self._tracker: Any = megatron_random._CUDA_RNG_STATE_TRACKER
        self._named: dict[str, Any] = dict(self._tracker.get_states()) if self._tracker is not None else {}
        # With CUDA graphs the names have generators, which a draw changes; else tensors, which it replaces.
        self._generators = [(g, g.get_state()) for g in self._named.values() if isinstance(g, torch.Generator)]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        for generator, state in self._generators:
            generator.set_state(state)
        if self._named:
            self._tracker.set_states(dict(self._named))


# ------------------------------------------------------------------------------------------------------- micro-batches


class MicroBatches:
    """The micro-batches of a step, from `data_iterator` of Megatron's schedules, as often as they are wanted.

    Args:
        data_iterator: An iterator, or None, or a list of them, one for each model chunk. An object without `__next__`
            (slime's, with `get_next`) is taken to have its position in its attributes.

    Attributes:
        data_iterator: The same for the schedule, which must be called with it.
        unknown: The class of an object that cannot be set back, because it keeps an iterator of its own; None = all
            can.
    """

    def __init__(self, data_iterator: Any):
        self._kept: dict[int, Recorded | _Attributes] = {}
        self.unknown: str | None = None
        several = isinstance(data_iterator, list)
        ours = [self._keep(source) for source in (data_iterator if several else [data_iterator])]
        self.data_iterator = ours if several else ours[0]

    def _keep(self, source: Any) -> Any:
        if source is None:
            return None
        if id(source) not in self._kept:  # chunks may share an iterator
            self._kept[id(source)] = Recorded(source) if hasattr(source, "__next__") else _Attributes(source)
        kept = self._kept[id(source)]
        if isinstance(kept, Recorded):
            return kept
        if not kept.complete:
            self.unknown = type(source).__name__
        return source

    def rewind(self) -> None:
        """The next micro-batch is again the first one of the step."""
        for kept in self._kept.values():
            kept.rewind()


class Recorded:
    """An iterator that keeps its items, so that it can be iterated again. It takes no item before it is asked for one.
    Other attributes are the source's."""

    def __init__(self, source: Any):
        self._source, self._position = source, 0
        self._items: list[Any] = []

    def __iter__(self) -> Recorded:
        return self

    def __next__(self) -> Any:
        if self._position == len(self._items):
            self._items.append(next(self._source))
        item = self._items[self._position]
        self._position += 1
        return _containers(item)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def rewind(self) -> None:
        self._position = 0


def _containers(item: Any) -> Any:
    """The item, with dicts and lists of its own, from which a forward step may take entries."""
    if type(item) is dict:
        return {key: _containers(value) for key, value in item.items()}
    if type(item) in (list, tuple):
        return type(item)(map(_containers, item))
    return item


class _Attributes:
    """The attributes of an object, to set it back.

    Attributes:
        complete: Whether they have its position: none of them is an iterator.
    """

    def __init__(self, source: Any):
        self._source, self._values = source, dict(vars(source)) if hasattr(source, "__dict__") else {}
        self.complete = bool(self._values) and not any(hasattr(value, "__next__") for value in self._values.values())

    def rewind(self) -> None:
        vars(self._source).clear()
        vars(self._source).update(self._values)
