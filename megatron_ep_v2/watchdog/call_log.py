"""What a rank is doing, in memory that it shares with its watcher: its dispatches and combines, numbered from 1."""

from __future__ import annotations

import mmap
import struct
import threading

KINDS = (
    *("forward dispatch", "forward combine", "backward of the combine", "backward of the dispatch"),
    *("recomputed dispatch", "sync-free forward dispatch"),
)
FORWARD_DISPATCH, FORWARD_COMBINE, BACKWARD_OF_COMBINE, BACKWARD_OF_DISPATCH = range(4)
RECOMPUTED_DISPATCH, SYNC_FREE_DISPATCH = 4, 5  # which return before they have finished, as all but the first do

# Cells of 8 bytes. The last call whose end the GPU has passed, modulo NUMBERS (the GPU writes it itself); calls
# entered, left, and marked for the GPU; the thread of the last call; then RING calls of WIDTH cells.
DONE, ENTERED, LEFT, MARKED, THREAD, HEAD, WIDTH, RING = 0, 1, 2, 3, 4, 8, 4, 512
NUMBERS = 4096  # more than the calls that the GPU can be behind: a launch blocks at about 1000 that are queued
RECORD_BYTES = 8 * (HEAD + WIDTH * RING)
_ENTRY = struct.Struct("=4q")


class Record:
    """Written by the rank, with a few stores a call; read by its watcher at any time, hence the order of the stores."""

    def __init__(self, fd: int):
        self.page = mmap.mmap(fd, RECORD_BYTES)
        self.cells = memoryview(self.page).cast("q")

    def enter(self, kind: int, step: int, moe_call: int, tokens: int) -> int:
        """Begin a call; returns its number. kind: an index into KINDS."""
        cells = self.cells
        number: int = cells[ENTERED] + 1
        _ENTRY.pack_into(self.page, 8 * (HEAD + number % RING * WIDTH), kind, step, moe_call, tokens)
        cells[THREAD] = threading.get_ident()
        cells[ENTERED] = number
        return number

    def retract(self) -> None:
        """Take back a call that was refused before it began."""
        self.cells[ENTERED] -= 1

    def call(self, number: int) -> list[int]:
        """[number, kind, step, moe_call, tokens] of one of the last RING calls."""
        place = HEAD + number % RING * WIDTH
        return [number, *self.cells[place : place + WIDTH]]

    def pending(self) -> int:
        """The first call that has not finished, 0 if none."""
        cells = self.cells
        done = cells[DONE]  # first: then it is not ahead of the calls left, by which it is told how often it began anew
        entered, left, marked = cells[ENTERED], cells[LEFT], cells[MARKED]
        done = left - (left - done) % NUMBERS
        if done < marked:
            number: int = done + 1
            while number <= left and self.call(number)[1] == FORWARD_DISPATCH:
                number += 1  # it waits on the host, so it had finished when it was left
            return number
        return entered if entered > left else 0
