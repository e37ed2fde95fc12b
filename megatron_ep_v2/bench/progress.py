"""Progress and remaining time, on stderr from rank 0."""

from __future__ import annotations

import sys
import time

_EVERY = 2.0  # seconds between messages


class Progress:
    """Progress over several tables.

    Args:
        tables: Number of tables.
        silent: True on ranks other than 0.
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
        """Report that a step begins."""
        self.rounds_begin, self.last = time.monotonic(), 0.0
        self._write(text + (self._left(0.0) if self.table > 1 else ""))

    def round(self, done: int, of: int) -> None:
        """Report that a round of repeats has finished; prints every few seconds and at the end."""
        now = time.monotonic()
        if now - self.last < _EVERY and done < of:
            return
        self.last = now
        rest = (now - self.rounds_begin) / done * (of - done)
        self._write(f"round {done}/{of}" + self._left(rest))

    def _left(self, rest_of_table: float) -> str:
        """Remaining time: the rest of this table, and the mean time of a table for each of the others."""
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
