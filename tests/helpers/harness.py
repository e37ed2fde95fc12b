"""Real ranks for tests: `run_ranks(n, fn, *args)` runs `fn(group, *args)` in n processes and returns their n results.
`@isolated` gives such a function no settings and no buffers of an earlier one.

Importing torch and Megatron costs seconds, a process group on gloo costs milliseconds. So processes are forked from a
server that has imported them and done nothing with them (no thread, no CUDA), are kept warm and reused, and every run
gets a process group of its own, over a new file store. A run that fails takes its processes with it: the next run never
meets what is left of a failed one.

A run ends in one of five ways: every rank returns; a rank raises (the others get `GRACE` seconds to finish, then they
are killed); a rank dies; `HANG` seconds pass; the caller has seen `enough`. All but the first raise one `RanksError`
with the traceback of every rank that raised and the stack of every rank that was stuck.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import ensure_running, set_forkserver_preload
from pathlib import Path
from typing import Any

from tests.helpers.paths import PYTHONPATH
from tests.helpers.progress import say
from tests.helpers.rank_process import GRACE, serve

# Seconds for anything that a test waits for. Against hangs only: the slowest takes 40 s on two idle cores, and no test
# is about speed. pytest's own limit (pyproject.toml) is longer, because it cannot tell who was stuck where.
HANG = 900.0
STACK_LIMIT = 30.0  # seconds for a process to write its stacks


class RanksError(Exception):
    """One or more ranks failed. `reports` maps each failing rank to its traceback or to what it was doing."""

    def __init__(self, size: int, reports: dict[int, str]):
        self.reports = reports
        ranks = ", ".join(str(rank) for rank in sorted(reports))
        text = "\n".join(f"----- rank {rank} of {size}\n{report.rstrip()}" for rank, report in sorted(reports.items()))
        super().__init__(f"rank {ranks} of {size} failed\n{text}")


def run_ranks(
    size: int,
    fn: Callable[..., Any],
    *args: Any,
    backend: str = "gloo",
    timeout: float = HANG,
    env: dict[str, str] | None = None,
    fresh: bool = False,
    enough: Callable[[], bool] | None = None,
) -> list[Any]:
    """Run `fn(group, *args)` on `size` ranks; return what each returned, in rank order.

    Args:
        size: Ranks, each a process with one torch thread.
        fn: A top-level function of an importable module. It gets the default process group.
        args: Picklable arguments, the same for every rank. Results are pickled too, tensors as host values.
        backend: gloo, or nccl (each rank then uses the GPU that `gpus.gpu_of` gives it).
        timeout: Seconds for the whole run, not counting the start of new processes.
        env: Environment variables for this run only.
        fresh: Use new processes and end them afterwards: for functions that change what an import has made.
        enough: Asked ten times a second: True ends the ranks that are still running. For ranks that would not come
            back: a call that waits in C with Python's lock cannot end its own process.

    Raises:
        RanksError: A rank raised, died, did not finish in time or was ended.
    """
    pool = _Pool() if fresh else _shared_pool
    name = f"{size} ranks{', new processes' if fresh else ''}: {getattr(fn, '__name__', fn)}"
    slow, began = backend == "nccl", time.monotonic()
    if slow:
        say(f"{name} (at most {timeout:.0f} s)")
    try:
        return pool.run(size, fn, args, backend, timeout, env or {}, enough)
    finally:
        if fresh:
            pool.close()
        if slow:
            say(f"{name}: {time.monotonic() - began:.1f} s")


def isolated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that ranks run: no settings or buffers of an earlier run, and none for a later one."""

    @functools.wraps(fn)
    def wrapper(group: Any, *args: Any) -> Any:
        from megatron_ep_v2 import settings  # not above: a job looks at a Megatron without this package
        from megatron_ep_v2.buffers.pool import destroy_buffers

        settings.activate(None)
        try:
            return fn(group, *args)
        finally:
            destroy_buffers()
            settings.activate(None)

    return wrapper


def close_shared_pool() -> None:
    """End all warm processes."""
    _shared_pool.close()


class _Process:
    """One warm process, seen from the test process."""

    def __init__(self, folder: Path, number: int):
        context = server()
        self.stacks = folder / f"stacks-{number}"
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, str(self.stacks), dict(os.environ)), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def await_ready(self) -> None:
        if not self.ready:
            if not self.connection.poll(HANG):
                raise RuntimeError(f"a rank process did not start in {HANG:.0f} s")
            self.connection.recv_bytes()  # EOFError here: the process died while starting, its stderr says why
            self.ready = True

    def where(self) -> str:
        """The stacks of all threads, now."""
        self.stacks.write_bytes(b"")
        os.kill(self.process.pid, signal.SIGUSR1)
        text, before, stop = "", "", time.monotonic() + STACK_LIMIT
        while (not text or text != before) and self.process.is_alive() and time.monotonic() < stop:
            time.sleep(0.2)
            before, text = text, self.stacks.read_text()
        return text


def server() -> Any:
    """The context whose processes are forked, in milliseconds, from one that has imported warm.py."""
    set_forkserver_preload(["tests.helpers.warm"])
    folders = [PYTHONPATH, *filter(None, [os.environ.get("PYTHONPATH")])]
    # One thread: a process with threads must not fork. It keeps the environment that it meets, so each process is given
    # today's.
    with _environment(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(folders)):
        ensure_running()  # once
    return multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


class _Pool:
    """Warm processes. Grows on demand; a run of n ranks uses the first n."""

    def __init__(self) -> None:
        self.folder: tempfile.TemporaryDirectory | None = None
        self.processes: list[_Process] = []
        self.started = self.runs = 0

    def run(
        self,
        size: int,
        fn: Callable[..., Any],
        args: tuple,
        backend: str,
        timeout: float,
        env: dict[str, str],
        enough: Callable[[], bool] | None,
    ) -> list[Any]:
        folder = self._grow(size)
        self.runs += 1
        store = folder / f"store-{self.runs}"
        jobs = [pickle.dumps((fn, args, rank, size, str(store), backend, timeout, env)) for rank in range(size)]
        try:
            for process, job in zip(self.processes, jobs):
                process.connection.send_bytes(job)
            results, reports = self._collect(self.processes[:size], time.monotonic() + timeout, timeout, enough)
        except BaseException:  # Ctrl-C in the middle of a run: its late answers must not meet the next run
            self._end(size)
            raise
        store.unlink(missing_ok=True)
        if reports:
            self._end(size)
            raise RanksError(size, reports)
        return [results[rank] for rank in range(size)]

    def _grow(self, size: int) -> Path:
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        folder = Path(self.folder.name)
        while len(self.processes) < size:
            self.started += 1
            self.processes.append(_Process(folder, self.started))
        for process in self.processes[:size]:
            process.await_ready()
        return folder

    def _end(self, size: int) -> None:
        ending = self.processes[:size]
        del self.processes[:size]
        for process in ending:
            process.connection.close()  # a waiting process ends by itself
        limit = time.monotonic() + 0.2
        for process in ending:
            process.process.join(max(0.0, limit - time.monotonic()))
        for process in ending:
            process.process.kill()  # does nothing to one that has ended
        for process in ending:
            process.process.join()

    @staticmethod
    def _collect(
        processes: list[_Process], deadline: float, timeout: float, enough: Callable[[], bool] | None
    ) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        reports: dict[int, str] = {}
        waiting: dict[Connection, int] = {process.connection: rank for rank, process in enumerate(processes)}
        limit = f"{timeout:.0f} s passed"
        while waiting:
            left = max(0.0, deadline - time.monotonic())
            answered = wait(list(waiting), left if enough is None else min(left, 0.1))
            if not answered and time.monotonic() < deadline:
                if enough is not None and enough():
                    reports.update({rank: "ended by the test, which has seen enough" for rank in waiting.values()})
                    for rank in waiting.values():
                        processes[rank].process.kill()
                    break
                continue
            if not answered:
                stuck = {rank: processes[rank].where() for rank in waiting.values()}
                reports.update({rank: f"{limit}; this rank was here:\n{stack}" for rank, stack in stuck.items()})
                break
            for connection in answered:
                rank = waiting.pop(connection)
                try:
                    ok, answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    processes[rank].process.join(GRACE)
                    ok, answer = False, f"the process died, exit code {processes[rank].process.exitcode}"
                if ok:
                    results[rank] = answer
                    continue
                reports[rank] = answer
                if time.monotonic() + GRACE < deadline:
                    deadline = time.monotonic() + GRACE
                    limit = f"{GRACE:.0f} s after rank {rank} had failed"
        return results, reports

    def close(self) -> None:
        self._end(len(self.processes))
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None


_shared_pool = _Pool()
