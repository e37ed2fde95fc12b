"""Calls that were started: the host goes on, and waits for the result when it needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch

from megatron_ep_v2 import streams

T = TypeVar("T")


class Pending(Generic[T]):
    """The result of a call that was started.

    On a GPU the streams that start it, finish it and take its result may be three: each waits for the one before, and
    the result's memory is not reused before the streams that started it and took it are done with it.

    Args:
        finish: Finishes the call; called once, on the stream that is current then.
    """

    def __init__(self, finish: Callable[[], T]):
        self._finish: Callable[[], T] | None = finish
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._started_on = _current_stream()
        self._finished_on: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    def finish(self) -> None:
        """Finish the call and keep its result. A second call does nothing."""
        if self._finish is None:
            return
        finish, self._finish = self._finish, None
        try:
            self._result.append(finish())
        except BaseException as error:
            self._error = error
            raise
        stream, started_on = _current_stream(), self._started_on
        if stream is not None:
            event = torch.cuda.Event()
            event.record(stream)
            self._finished_on = stream, event
            if started_on is not None and started_on != stream:
                streams.record(_tensors(self._result[0]), started_on)  # later calls with the handle come from there

    def give_up(self, error: BaseException) -> None:
        """Raise an error in `wait`, instead of finishing the call. Changes nothing once it is finished."""
        if self._finish is not None:
            self._finish, self._error = None, error

    def follow(self) -> bool:
        """Let the current stream wait for the end of the call, once finished. Returns whether it had to."""
        if self._finished_on is None:
            return False
        stream, event = self._finished_on
        current = torch.cuda.current_stream()
        if current == stream:
            return False
        current.wait_event(event)
        return True

    def wait(self) -> T:
        """Finish the call and hand its result over, once.

        Raises:
            BaseException: What the call has raised, also if something else has finished it.
        """
        self.finish()
        if self._error is not None:
            raise self._error
        result = self._result.pop()
        if self.follow():
            streams.record(_tensors(result))
        return result


class Starter:
    """Of a buffer that has one started call at most: its rows lie in memory that the next call writes to, so that one
    finishes it first."""

    _started: Pending[Any] | None = None

    def _start(self, finish: Callable[[], T]) -> Pending[T]:
        self._started = pending = Pending(finish)
        return pending

    def _finish_started(self) -> None:
        """Before every call."""
        started, self._started = self._started, None
        if started is not None:
            started.finish()
            started.follow()  # it may have been finished on another stream than the call's


def _current_stream() -> torch.cuda.Stream | None:
    """None where CUDA is not in use."""
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None


def _tensors(result: object) -> Iterator[torch.Tensor]:
    """The tensors in a call's result, and in the attributes of a handle there."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, tuple):
        for each in result:
            yield from _tensors(each)
    elif hasattr(result, "topk_idx"):
        for each in vars(result).values():
            if isinstance(each, torch.Tensor):
                yield from _tensors(each)
