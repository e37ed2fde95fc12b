"""CUDA streams on a CPU: who uses which memory, in which order, and whether it may be handed out again.

torch's allocator hands freed memory out again in the order of the stream that it was allocated on, its owner. Work that
other streams were given may not have read it by then. So when memory is freed, each other stream that has used it must
be one that the owner has waited for since that use, or be recorded (`Tensor.record_stream`). Else there is a hazard.

Streams and events are vector clocks here. An operation counts for the stream that is current when it is called, a
backward for its forward's, as in autograd. Views and the shapes of new tensors use no memory, and what
`torch.frombuffer` returns is on the host with a GPU, too.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.fx.traceback
from torch.autograd import Variable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_ep_v2
from megatron_ep_v2 import streams
from megatron_ep_v2.buffers import pending

OURS = str(Path(megatron_ep_v2.__file__).parent)
NOT_SHOWN = (str(Path(torch.__file__).parent), contextlib.__file__, __file__)


class Stream:
    """In place of a torch.cuda.Stream.

    Attributes:
        after: How many operations of each stream what is given to this one now runs after.
    """

    current: ClassVar[Stream]

    def __init__(self, *_: Any, name: str = "another", **__: Any):
        self.name, self.after = name, {self: 0}

    def __repr__(self) -> str:
        return self.name

    def run(self) -> int:
        self.after[self] += 1
        return self.after[self]

    def wait_event(self, event: Event) -> None:
        for stream, count in event.after.items():
            self.after[stream] = max(self.after.get(stream, 0), count)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    """In place of a torch.cuda.Event."""

    def __init__(self, *_: Any, **__: Any):
        self.after: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.after = dict((stream or Stream.current).after)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Stream.current).wait_event(self)


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """In place of torch.cuda.stream."""
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


@contextlib.contextmanager
def streams_on_the_cpu() -> Iterator[Stream]:
    """torch.cuda's streams and events are those above. Yields the current one."""
    Stream.current = Stream(name="compute")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("Stream", Stream), ("Event", Event), ("stream", on_stream)):
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda, "current_stream", lambda *_: Stream.current)
        patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        yield Stream.current


@dataclass(frozen=True)
class Use:
    """An operation on memory: its name, the line that called it, its stream, its number there."""

    name: str
    line: str
    stream: Stream
    number: int

    def __str__(self) -> str:
        return f"{self.name} on {self.stream} at {self.line}"


@dataclass(eq=False)
class Memory:
    """Of one storage.

    Attributes:
        made: The first use; its stream is the owner.
        what: Shape and dtype of the first tensor in it.
        ours: Whether this package, or its buffer, has made or used it.
        last: Last use by each stream.
        recorded: Streams that are.
    """

    made: Use
    what: str
    storage: weakref.ref[torch.UntypedStorage]
    ours: bool = False
    last: dict[Stream, Use] = field(default_factory=dict)
    recorded: set[Stream] = field(default_factory=set)

    def hazards(self) -> Iterator[str]:
        """If it is freed now."""
        owner = self.made.stream
        for stream, use in self.last.items():
            if stream not in self.recorded and owner.after.get(stream, 0) < use.number:
                yield f"{self.what} of {self.made} may be overwritten before {use}"


class StreamMemory(TorchDispatchMode):
    """Notes which stream uses which memory, and the hazards when it is freed; inside `streams_on_the_cpu`.

    Args:
        on_reuse: Judge memory when its owner makes the next tensor, which may get it, and not already when it is freed:
            exact for this order of calls, and says nothing of others.

    Attributes:
        ours: Hazards of memory that this package or its buffer has made or used.
        others: Of memory that it has never seen.
        patch: Undone at the end.
    """

    def __init__(self, on_reuse: bool = False) -> None:
        super().__init__()
        self._on_reuse, self._freed = on_reuse, list[Memory]()
        self.ours: list[str] = []
        self.others: list[str] = []
        self._all: dict[int, Memory] = {}
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> StreamMemory:
        resize, from_buffer = torch.UntypedStorage.resize_, torch.frombuffer
        self._host: dict[int, torch.Tensor] = {}  # alive, so that no other storage has one of these numbers

        def free(storage: torch.UntypedStorage, size: int) -> None:
            assert size == 0
            self._free(storage._cdata)
            resize(storage, size)

        def on_host(*args: Any, **named: Any) -> torch.Tensor:
            tensor = from_buffer(*args, **named)
            return self._host.setdefault(tensor.untyped_storage()._cdata, tensor)

        def record(tensor: torch.Tensor, stream: Stream) -> None:
            if (memory := self._all.get(tensor.untyped_storage()._cdata)) is not None:
                memory.recorded.add(stream)

        def record_ours(tensors: Iterable[torch.Tensor | None], stream: Stream | None = None) -> None:
            for tensor in tensors:  # which is on a CPU here
                if tensor is not None:
                    record(tensor, stream or Stream.current)

        self.patch.setattr(torch.UntypedStorage, "resize_", free)
        self.patch.setattr(torch, "frombuffer", on_host)
        self.patch.setattr(torch.Tensor, "record_stream", record)
        self.patch.setattr(streams, "record", record_ours)
        self.patch.setattr(pending, "_current_stream", lambda: Stream.current)
        self.patch.setattr(Variable, "_execution_engine", Engine(Variable._execution_engine, record))
        # Each node of the autograd graph then has, as the stack in its metadata, the stream that it was made on.
        self.patch.setattr(torch.fx.traceback, "format_stack", lambda: [Stream.current])
        self.patch.setattr(torch, "is_anomaly_enabled", lambda: False)  # by this package
        self._anomaly = torch.autograd.set_detect_anomaly(True, check_nan=False)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._anomaly.__exit__()
        self.patch.undo()
        self._all.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
            of_shape = name.startswith("new_") or name.endswith("_like")
            self._use(name, tree_leaves(results if of_shape else (args, kwargs, results)))
        return results

    def _use(self, name: str, values: list[Any]) -> None:
        if Engine.running:
            return
        stream = Stream.current
        line, ours = _caller()
        use = Use(name, line, stream, stream.run())
        for tensor in values:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            number = storage._cdata
            if storage.nbytes() == 0 or number in self._host:
                continue
            if number not in self._all:
                self._judge([each for each in self._freed if each.made.stream is stream])
                gone = weakref.ref(storage, lambda _, number=number: self._free(number))
                self._all[number] = Memory(use, f"{tuple(tensor.shape)} {tensor.dtype}", gone)
            memory = self._all[number]
            memory.ours |= ours
            memory.last[stream] = use

    def _free(self, number: int) -> None:
        if (memory := self._all.pop(number, None)) is not None:
            self._freed.append(memory)
            if not self._on_reuse:
                self._judge([memory])

    def _judge(self, freed: list[Memory]) -> None:
        for memory in freed:
            self._freed.remove(memory)
            (self.ours if memory.ours else self.others).extend(memory.hazards())


class Engine:
    """In place of autograd's, which it calls: a node runs on the stream that it was made on, after those that have made
    its gradients, for which that stream is recorded; at the end the caller's stream waits for the leaves'.

    Args:
        engine: Autograd's.
        record: `Tensor.record_stream`.
    """

    running: ClassVar[bool] = False  # but no node: gradients are added up, on the stream of the node that takes them

    def __init__(self, engine: Any, record: Callable[[torch.Tensor, Stream], None]):
        self._engine, self._record = engine, record

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run_backward(self, tensors: Any, *args: Any, **named: Any) -> Any:
        caller, nested, begin = Stream.current, Engine.running, Event()
        begin.record()
        nodes = {node: _Node(node.metadata.get("traceback_", [caller])[0]) for node in _graph(tensors)}
        for root in _roots(tensors):
            nodes[root].after.append((caller, begin))
        for node, each in nodes.items():
            for following, _ in node.next_functions:
                if following is not None:
                    nodes[following].after.append((each.stream, each.end))
        hooks = [node.register_prehook(functools.partial(self._before, each)) for node, each in nodes.items()]
        hooks += [node.register_hook(functools.partial(self._after, each)) for node, each in nodes.items()]
        Engine.running = True
        try:
            return self._engine.run_backward(tensors, *args, **named)
        finally:
            Stream.current, Engine.running = caller, nested
            for hook in hooks:
                hook.remove()
            for node, each in nodes.items():
                if not node.next_functions:
                    each.end.wait()

    def _before(self, node: _Node, grads: tuple[torch.Tensor | None, ...]) -> None:
        Engine.running, Stream.current = False, node.stream
        for stream, end in node.after:
            if stream is not node.stream:
                end.wait()
                for grad in grads:
                    if grad is not None:
                        self._record(grad, node.stream)

    def _after(self, node: _Node, *_: Any) -> None:
        node.end.record()
        Engine.running = True


@dataclass
class _Node:
    """Of the autograd graph. after: Stream and end of each node that makes its gradients."""

    stream: Stream
    end: Event = field(default_factory=Event)
    after: list[tuple[Stream, Event]] = field(default_factory=list)


def _roots(tensors: Any) -> list[Any]:
    return [torch.autograd.graph.get_gradient_edge(each).node for each in tensors if each.requires_grad]


def _graph(tensors: Any) -> set[Any]:
    """Of the autograd graph of tensors."""
    found: set[Any] = set()
    left = _roots(tensors)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [following for following, _ in node.next_functions if following is not None]
    return found


def _caller() -> tuple[str, bool]:
    """The innermost line outside torch, and whether this package is among the callers."""
    frame, line, ours = sys._getframe(1), "", False
    while frame is not None and not ours:
        name = frame.f_code.co_filename
        if not line and not name.startswith(NOT_SHOWN):
            line = f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno}"
        ours = name.startswith(OURS)
        frame = frame.f_back  # type: ignore[assignment]
    return line, ours
