"""The log of a rank's dispatches and combines, numbered from 1, in memory that the rank shares with its watcher."""

from __future__ import annotations

import mmap
import struct
import threading

KINDS = (
    *("forward dispatch", "forward combine", "backward of the combine", "backward of the dispatch"),
    *("recomputed dispatch", "sync-free forward dispatch"),
    *("transfer of redundant experts' weights", "transfer of redundant experts' gradients"),
)
FORWARD_DISPATCH, FORWARD_COMBINE, BACKWARD_OF_COMBINE, BACKWARD_OF_DISPATCH = range(4)
RECOMPUTED_DISPATCH, SYNC_FREE_DISPATCH = 4, 5
EXPERT_WEIGHTS, EXPERT_GRADIENTS = 6, 7
# On a GPU, every kind except FORWARD_DISPATCH returns before it has finished.

# Cells of 8 bytes. DONE: the last call that the GPU has finished, modulo NUMBERS, written by the GPU. The calls
# entered, left, and marked for the GPU; the thread of the last call; from HEAD on, RING calls of WIDTH cells.
DONE, ENTERED, LEFT, MARKED, THREAD, HEAD, WIDTH, RING = 0, 1, 2, 3, 4, 8, 4, 512
NUMBERS = 4096  # more calls than can be queued on the GPU: a launch blocks when about 1000 are
LOG_BYTES = 8 * (HEAD + WIDTH * RING)
_ENTRY = struct.Struct("=4q")


class CallLog:
    """Written by the rank with a few stores per call, in an order that lets its watcher read at any time."""

    def __init__(self, fd: int):
        self.page = mmap.mmap(fd, LOG_BYTES)
        self.cells = memoryview(self.page).cast("q")

    def enter(self, kind: int, step: int, moe_call: int, tokens: int) -> int:
        """Begin a call; returns its number. kind: an index into KINDS."""
        cells = self.cells
        number: int = cells[ENTERED] + 1
        _ENTRY.pack_into(self.page, 8 * (HEAD + number % RING * WIDTH), kind, step, moe_call, tokens)
        cells[THREAD] = threading.get_ident()
        cells[ENTERED] = number
        return number

    def wait(self) -> None:
        """The host waits for the last call, which it has started and left."""
        self.cells[THREAD] = threading.get_ident()
        self.cells[LEFT] = self.cells[ENTERED] - 1

    def retract(self) -> None:
        """Remove the last call, which was refused before it began."""
        self.cells[ENTERED] -= 1

    def call(self, number: int) -> list[int]:
        """[number, kind, step, moe_call, tokens] of one of the last RING calls."""
        cell = HEAD + number % RING * WIDTH
        return [number, *self.cells[cell : cell + WIDTH]]

    def pending(self) -> int:
        """The first call that has not finished, 0 if none."""
        cells = self.cells
        done = cells[DONE]  # read first, so that it is at most LEFT, from which its full number follows
        entered, left, marked = cells[ENTERED], cells[LEFT], cells[MARKED]
        done = left - (left - done) % NUMBERS
        if done < marked:
            number: int = done + 1
            while number <= left and self.call(number)[1] == FORWARD_DISPATCH:
                number += 1  # waits on the host, so it had finished when it returned
            return number
        return entered if entered > left else 0
