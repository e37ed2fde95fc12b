"""What is going on, and how long it will take, on stderr from rank 0."""

from __future__ import annotations

import sys
import time

_EVERY = 2.0  # seconds between lines of a round


class Progress:
    """Of a number of tables.

    Args:
        tables: How many there will be.
        silent: On ranks other than 0.
    """

    def __init__(self, tables: int, silent: bool):
        self.tables, self.silent = tables, silent
        self.table, self.name = 0, ""
        self.begin = self.table_begin = self.rounds_begin = time.monotonic()
        self.last = 0.0

    def next_table(self, name: str) -> None:
        self.table, self.name = self.table + 1, name
        self.table_begin = time.monotonic()

    def say(self, text: str) -> None:
        """A step has begun."""
        self.rounds_begin, self.last = time.monotonic(), 0.0
        self._write(text + (self._left(0.0) if self.table > 1 else ""))

    def round(self, done: int, of: int) -> None:
        """A round of repeats is done; said every few seconds and at the end."""
        now = time.monotonic()
        if now - self.last < _EVERY and done < of:
            return
        self.last = now
        rest = (now - self.rounds_begin) / done * (of - done)
        self._write(f"round {done}/{of}" + self._left(rest))

    def _left(self, rest_of_table: float) -> str:
        """The rest of this table, and the other tables as long as those so far."""
        now, finished = time.monotonic(), self.table - 1
        seconds = rest_of_table
        if finished:
            mean = (self.table_begin - self.begin) / finished
            seconds = max(seconds, mean - (now - self.table_begin)) + (self.tables - self.table) * mean
        else:
            seconds += (self.tables - self.table) * (now - self.begin + rest_of_table)
        return f", about {max(seconds, 0.0):.0f} s left"

    def _write(self, text: str) -> None:
        if not self.silent:
            sys.stderr.write(f"[{self.table}/{self.tables} {self.name}] {text}\n")
            sys.stderr.flush()
