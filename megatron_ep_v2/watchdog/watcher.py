"""The watcher: a process for each buffer of each rank. It reads the log of the rank's calls. When a call does not
finish, it asks the watchers of the other ranks what their ranks are doing, and prints one report.

A process, because a thread of the waiting rank cannot run: deep_ep 2.1.0 holds Python's global lock while its dispatch
waits on the host for the other ranks (2.5 releases it); and a rank that was killed, or aborted inside a collective, has
no threads. It needs the standard library only (40 ms to start, 12 MB), sends nothing until a call is overdue, and ends
with its rank.

Its standard input is its end of the connection from the rank: "failed WHY" asks for a report at once and gets a line as
the answer; "bye" says that the buffer was destroyed; end of file without "bye" says that the rank's process has ended.
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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from megatron_ep_v2.watchdog.call_log import ENTERED, LEFT, RING, THREAD, CallLog
from megatron_ep_v2.watchdog.report import Answer, choose_threads, find_late, write_report

Address: TypeAlias = tuple[str, int, str]  # of a watcher: address or name of its host, port, token

SETTLE_SECONDS = 0.3  # between a lost connection and the end of the process at its other end
LOOK_BACK = 32  # calls that a report compares
MOST_STACKS = 4
ANSWER_SECONDS = 2.0  # for other watchers to answer; a report asks twice


@dataclass(frozen=True, kw_only=True)
class Task:
    """The arguments of a watcher, from its rank.

    Attributes:
        rank: In the world, like all ranks here.
        host: The rank's host.
        seconds: The limit.
        token: Other watchers must send it to get an answer.
        peers: Addresses of the other ranks' watchers; None if a rank has none.
        main_thread: Of the rank's process.
        stack_signal: Makes the rank's process write its stacks to the file `stacks`.
        call_log, stacks, listener: File descriptors: the call log, the file for stacks, a listening socket.
    """

    rank: int
    host: str
    seconds: float
    token: str
    peers: dict[int, Address | None]
    main_thread: int
    stack_signal: int
    call_log: int
    stacks: int
    listener: int


class Watcher:
    """See the module's docstring.

    Args:
        task: From the rank.
        parent: The rank's process. Not os.getppid(), which differs if the rank has ended already.
    """

    def __init__(self, task: Task, parent: int):
        self.task, self.call_log, self.parent = task, CallLog(task.call_log), parent
        self.end = ""  # how the rank ended
        self.final_answers: dict[int, Answer] = {}  # of ranks that have ended
        self.state: tuple[int, ...] = ()
        self.since, self.reported = time.monotonic(), False
        self.stack_lock, self.stack_text, self.stack_time = threading.Lock(), "", 0.0

    def run(self) -> None:
        """Watch until the rank ends."""
        server = _Server(("", 0), _handler(self), bind_and_activate=False)
        server.socket.close()
        server.socket = socket.socket(fileno=self.task.listener)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while not self.end:
            if select.select([0], [], [], min(0.5, self.task.seconds / 10))[0]:
                self._listen(os.read(0, 65536).decode(errors="replace"))
            elif os.getppid() != self.parent:  # a fork of the rank still holds the connection
                self._listen("")
            else:
                self._look()
        cells = self.call_log.cells
        if cells[ENTERED] > cells[LEFT] and not self.reported:
            self._print(self.report(f"did not finish, {self.end}", even_if_all_arrived=False))
        self._ask(self.task.peers, "gone " + json.dumps(self.answer(cells[ENTERED])))

    def _listen(self, said: str) -> None:
        if said.startswith("failed"):
            if not self.reported:
                time.sleep(SETTLE_SECONDS)
                self._print(self.report(said.strip()))
            self.state, self.reported = (), False  # so that the next look starts a new limit
            with contextlib.suppress(OSError):
                os.write(1, b"reported\n")
        elif said:
            self._look()  # calls may have finished since the last look
            self.end = "its buffer was destroyed"
        else:
            self.end = "its process ended"

    def _look(self) -> None:
        """Report once when the call log has not changed for `seconds`; print a line when it changes again."""
        now, state = time.monotonic(), tuple(self.call_log.cells[:THREAD])
        if state != self.state:
            if self.reported:
                self._print(f"rank {self.task.rank}: goes on after {now - self.since:.1f} s")
            self.state, self.since, self.reported = state, now, False
        elif now - self.since >= self.task.seconds and not self.reported and self.call_log.pending():
            text = self.report(f"has not finished for {now - self.since:.0f} s")
            self.reported = state == tuple(self.call_log.cells[:THREAD])  # False: it changed while others were asked
            if self.reported:
                self._print(text)

    def report(self, what: str, even_if_all_arrived: bool = True) -> str:
        """Ask all watchers for their answers, and those of late ranks for stacks; returns the report, "" for none."""
        rank, number = self.task.rank, self.call_log.pending() or self.call_log.cells[ENTERED]
        answers = self._ask(self.task.peers, f"where {number}")
        answers = {**self.final_answers, **answers, rank: self.answer(number)}
        late = find_late(answers, [rank, *self.task.peers], number)
        if not late and not even_if_all_arrived:
            return ""  # the whole job has ended
        known = [answers[peer] for peer in late if peer != rank and peer in answers]
        running = [each["rank"] for each in known if not each["end"] and not each["stopped"]]
        stacks = self._ask(running[:MOST_STACKS], "stack")
        return "\n".join(write_report(rank, what, number, answers, late, stacks))

    def answer(self, around: int) -> Answer:
        """The answer to another watcher."""
        entered, pending = self.call_log.cells[ENTERED], self.call_log.pending()
        numbers = {*range(around - LOOK_BACK, around + 1), pending, entered}
        return {
            "rank": self.task.rank,
            "host": self.task.host,
            "entered": entered,
            "pending": pending,
            "calls": [self.call_log.call(n) for n in sorted(numbers) if max(0, entered - RING) < n <= entered],
            "idle": time.monotonic() - self.since,
            "end": self.end or ("" if os.getppid() == self.parent else "its process ended"),
            "stopped": not self.end and _is_stopped(self.parent),
        }

    def stack(self) -> str:
        """Stacks of the rank's main thread and of the thread of its last call. A handler in C writes them, which needs
        no lock of Python; at most once a second, whatever the number of requests."""
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
        return choose_threads(self.stack_text, self.task.main_thread, self.call_log.cells[THREAD])

    def _ask(self, ranks: Iterable[int], words: str) -> dict[int, Any]:
        """Answers of the ranks' watchers that can be reached in time, from JSON: rank -> an Answer to "where", the text
        of stacks to "stack", None to "gone"."""
        answers: dict[int, Any] = {}

        def ask(rank: int, address: str, port: int, token: str) -> None:
            reach = functools.partial(socket.create_connection, (address, port), ANSWER_SECONDS)
            with contextlib.suppress(OSError, ValueError), reach() as connection:
                connection.sendall(f"{token} {words}\n".encode())
                answers[rank] = json.loads(connection.makefile().readline())

        threads = [
            threading.Thread(target=ask, args=(rank, *address), daemon=True)
            for rank in ranks
            if (address := self.task.peers[rank])
        ]
        stop = time.monotonic() + ANSWER_SECONDS
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, stop - time.monotonic()))
        return dict(answers)

    @staticmethod
    def _print(text: str) -> None:
        """Write to standard error in one piece, because ranks share it."""
        if text:
            with contextlib.suppress(OSError):  # its reader has ended
                os.write(2, f"megatron_ep_v2 watchdog, {text}\n".encode())


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that disconnected."""


def _handler(watcher: Watcher) -> type[socketserver.StreamRequestHandler]:
    class Handler(socketserver.StreamRequestHandler):
        timeout = ANSWER_SECONDS

        def handle(self) -> None:
            token, word, rest = (*self.rfile.readline().decode().split(" ", 2), "")[:3]
            if token != watcher.task.token:
                return
            answer: Answer | str | None = None
            if word == "where":
                answer = watcher.answer(int(rest))
            elif word.strip() == "stack":
                answer = watcher.stack()
            else:
                final = json.loads(rest)
                watcher.final_answers[final["rank"]] = final
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    return Handler


def _is_stopped(process: int) -> bool:
    """Whether a signal or a debugger has stopped the process. False without /proc."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def main(size: int, parent: int) -> None:
    """Read the task and watch; exit silently if the rank has ended while it started the watcher.

    Args:
        size: Bytes of the Task in JSON, at the start of standard input.
        parent: The rank's process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ends when its rank does
    text = b""
    while len(text) < size:
        if select.select([0], [], [], 0.5)[0]:
            text += os.read(0, size - len(text)) or sys.exit(1)
        elif os.getppid() != parent:  # a fork of the rank still holds the connection
            sys.exit(1)
    values = json.loads(text)
    values["peers"] = {int(rank): address and tuple(address) for rank, address in values["peers"].items()}
    Watcher(Task(**values), parent).run()
