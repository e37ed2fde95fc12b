"""The watcher: a process beside each rank, for each of its buffers. It reads the record of the rank's calls, and when a
call does not finish, it asks the watchers of the other ranks where theirs are and prints one report.

A process, because no thread of a waiting rank could do it: deep_ep 2.1.0 keeps Python's global lock while its dispatch
waits on the host for the other ranks; and a rank that was killed, or aborted inside a collective, has no threads. It
needs the standard library only (40 ms to start, 12 MB), asks nobody anything until a call is overdue, and ends with its
rank.

Its standard input is its end of a line from the rank: "failed WHY" asks for a report at once and is answered with a
line; "bye" says that the buffer was destroyed; and the line's end, without a word, that the rank's process has ended.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ep_v2.watchdog.call_log import ENTERED, LEFT, RING, THREAD, Record
from megatron_ep_v2.watchdog.report import choose_threads, find_late, write_report

SETTLE_SECONDS = 0.3  # from a lost connection to the end of the process that held it
LOOK_BACK = 32  # calls that a report compares
MOST_STACKS = 4
ANSWER_SECONDS = 2.0  # for other watchers to answer; a report asks twice


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a watcher is told by its rank.

    Attributes:
        rank: Of the world, as are all ranks here.
        host: Its name.
        seconds: The limit.
        token: What other watchers say before they are answered.
        peers: The other ranks' (address or name of the host, port, token); None where a rank has no watcher.
        main_thread: Of the rank's process.
        stack_signal: Makes the rank's process write its stacks to the file `stacks`.
        record, stacks, listener: File descriptors: the record, the file for stacks, a listening socket.
    """

    rank: int
    host: str
    seconds: float
    token: str
    peers: dict[int, Any]
    main_thread: int
    stack_signal: int
    record: int
    stacks: int
    listener: int


class Watcher:
    """See the module's docstring.

    Args:
        task: From the rank.
        parent: The rank's process. Not os.getppid(), which is another's where the rank has ended by now.
    """

    def __init__(self, task: Task, parent: int):
        self.task, self.record, self.parent = task, Record(task.record), parent
        self.end = ""  # how the rank came to its end
        self.last_words: dict[int, dict[str, Any]] = {}  # of ranks that came to their end
        self.state: tuple[int, ...] = ()
        self.since, self.reported = time.monotonic(), False
        self.stack_lock, self.stack_text, self.stack_time = threading.Lock(), "", 0.0

    def run(self) -> None:
        """Until the rank ends."""
        server = _Server(("", 0), _handler(self), bind_and_activate=False)
        server.socket.close()
        server.socket = socket.socket(fileno=self.task.listener)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while not self.end:
            if select.select([0], [], [], min(0.5, self.task.seconds / 10))[0]:
                self._listen(os.read(0, 65536).decode(errors="replace"))
            elif os.getppid() != self.parent:  # some fork of the rank still holds the other end of the line
                self._listen("")
            else:
                self._look()
        cells = self.record.cells
        if cells[ENTERED] > cells[LEFT] and not self.reported:
            self._say(self.report(f"did not finish, {self.end}", even_if_all_came=False))
        self._ask(self.task.peers, "gone " + json.dumps(self.answer(cells[ENTERED])))

    def _listen(self, said: str) -> None:
        if said.startswith("failed"):
            if not self.reported:
                time.sleep(SETTLE_SECONDS)
                self._say(self.report(said.strip()))
            self.state, self.reported = (), False  # it does not go on
            with contextlib.suppress(OSError):
                os.write(1, b"reported\n")
        elif said:
            self._look()  # it may have gone on since the last look
            self.end = "its buffer was destroyed"
        else:
            self.end = "its process ended"

    def _look(self) -> None:
        """Report once when nothing has moved for too long; say so when it moves again."""
        now, state = time.monotonic(), tuple(self.record.cells[:THREAD])
        if state != self.state:
            if self.reported:
                self._say(f"rank {self.task.rank}: goes on after {now - self.since:.1f} s")
            self.state, self.since, self.reported = state, now, False
        elif now - self.since >= self.task.seconds and not self.reported and self.record.pending():
            text = self.report(f"has not finished for {now - self.since:.0f} s")
            self.reported = state == tuple(self.record.cells[:THREAD])  # else it moved while others were asked
            if self.reported:
                self._say(text)

    def report(self, what: str, even_if_all_came: bool = True) -> str:
        """Ask all where they are, and the late ones for their stacks. Empty if there is nothing to say."""
        rank, number = self.task.rank, self.record.pending() or self.record.cells[ENTERED]
        answers = self._ask(self.task.peers, f"where {number}")
        answers = {**self.last_words, **answers, rank: self.answer(number)}
        late = find_late(answers, [rank, *self.task.peers], number)
        if not late and not even_if_all_came:
            return ""  # the whole job was ended
        known = [answers[peer] for peer in late if peer != rank and peer in answers]
        running = [each["rank"] for each in known if not each["end"] and not each["stopped"]]
        stacks = self._ask(running[:MOST_STACKS], "stack")
        return "\n".join(write_report(rank, what, number, answers, late, stacks))

    def answer(self, around: int) -> dict[str, Any]:
        """See report.py."""
        entered, pending = self.record.cells[ENTERED], self.record.pending()
        numbers = {*range(around - LOOK_BACK, around + 1), pending, entered}
        return {
            "rank": self.task.rank,
            "host": self.task.host,
            "entered": entered,
            "left": self.record.cells[LEFT],
            "pending": pending,
            "calls": [self.record.call(n) for n in sorted(numbers) if max(0, entered - RING) < n <= entered],
            "idle": time.monotonic() - self.since,
            "end": self.end or ("" if os.getppid() == self.parent else "its process ended"),
            "stopped": not self.end and _is_stopped(self.parent),
        }

    def stack(self) -> str:
        """Of the rank's main thread and of the thread of its last call. A handler in C writes it, which waits for no
        lock of Python's; once a second at most, however many ask."""
        with self.stack_lock:
            if time.monotonic() - self.stack_time > 1:
                file = self.task.stacks
                os.ftruncate(file, 0)
                os.lseek(file, 0, os.SEEK_SET)
                if os.getppid() == self.parent:
                    os.kill(self.parent, self.task.stack_signal)
                text, before, stop = b"", b"", time.monotonic() + ANSWER_SECONDS / 2
                while (not text or text != before) and time.monotonic() < stop:
                    time.sleep(0.05)
                    before, text = text, os.pread(file, 1 << 20, 0)
                self.stack_text, self.stack_time = text.decode(errors="replace"), time.monotonic()
        return choose_threads(self.stack_text, self.task.main_thread, self.record.cells[THREAD])

    def _ask(self, ranks: Any, words: str) -> dict[int, Any]:
        """What those of the ranks' watchers answer that can be reached in time."""
        answers: dict[int, Any] = {}

        def ask(rank: int, address: str, port: int, token: str) -> None:
            reach = functools.partial(socket.create_connection, (address, port), ANSWER_SECONDS)
            with contextlib.suppress(OSError, ValueError), reach() as line:
                line.sendall(f"{token} {words}\n".encode())
                answers[rank] = json.loads(line.makefile().readline())

        threads = [
            threading.Thread(target=ask, args=(rank, *self.task.peers[rank]), daemon=True)
            for rank in ranks
            if self.task.peers[rank]
        ]
        stop = time.monotonic() + ANSWER_SECONDS
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, stop - time.monotonic()))
        return dict(answers)

    @staticmethod
    def _say(text: str) -> None:
        """In one piece: ranks share their standard error."""
        if text:
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(2, f"megatron_ep_v2 watchdog, {text}\n".encode())


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that went away is no news."""


def _handler(watcher: Watcher) -> type[socketserver.StreamRequestHandler]:
    class Handler(socketserver.StreamRequestHandler):
        timeout = ANSWER_SECONDS

        def handle(self) -> None:
            token, word, rest = (*self.rfile.readline().decode().split(" ", 2), "")[:3]
            if token != watcher.task.token:
                return
            answer: Any = None
            if word == "where":
                answer = watcher.answer(int(rest))
            elif word.strip() == "stack":
                answer = watcher.stack()
            else:
                last_words = json.loads(rest)
                watcher.last_words[last_words["rank"]] = last_words
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    return Handler


def _is_stopped(process: int) -> bool:
    """By a signal or a debugger. False where there is no /proc."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def main(size: int, parent: int) -> None:
    """Read the task and watch; end without a word if the rank ended while it started this.

    Args:
        size: Of the Task in JSON, the first bytes of standard input.
        parent: The rank's process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when its rank does
    text = b""
    while len(text) < size:
        if select.select([0], [], [], 0.5)[0]:
            text += os.read(0, size - len(text)) or sys.exit(1)
        elif os.getppid() != parent:  # some fork of the rank still holds the other end of the line
            sys.exit(1)
    values = json.loads(text)
    values["peers"] = {int(rank): address for rank, address in values["peers"].items()}
    Watcher(Task(**values), parent).run()
