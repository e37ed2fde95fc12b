"""Dispatches that were started: the host goes on, and waits for the counts when it needs the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Pending(Generic[T]):
    """The result of a call that was started.

    Args:
        finish: Finishes the call; called once, on the stream that is current then.
    """

    def __init__(self, finish: Callable[[], T]):
        self._finish: Callable[[], T] | None = finish
        self._result: list[T] = []
        self._error: BaseException | None = None

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

    def wait(self) -> T:
        """Finish the call and hand its result over, once.

        Raises:
            BaseException: What the call has raised, also if something else has finished it.
        """
        self.finish()
        if self._error is not None:
            raise self._error
        return self._result.pop()


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
