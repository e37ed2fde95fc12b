"""What ranks say, carried out of them: errors, and lines of the log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ep_v2.errors import EPError


@dataclass(frozen=True)
class Report:
    """What an error says, carried out of a rank."""

    kind: str
    text: str
    fix: str | None

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def attempt(fn: Callable[[], Any]) -> Report | None:
    """Call fn; report its error, None if there was none. Only this package's errors are expected."""
    try:
        fn()
    except EPError as error:
        return Report(type(error).__name__, str(error), error.fix)
    return None


def assert_report(report: Report | None, kind: type[EPError], *parts: str) -> None:
    assert report is not None, "nothing was raised"
    assert report.kind == kind.__name__, str(report)
    assert report.fix and f"\n  fix: {report.fix}" in report.text, str(report)
    for part in parts:
        assert part in report.text, f"{part!r} is not in: {report}"


@contextlib.contextmanager
def log_records(name: str = "megatron_ep_v2", level: int | None = None) -> Iterator[list[logging.LogRecord]]:
    """What this logger is given in the meantime, in a rank too, where pytest's caplog does not reach. level: None = as
    it is."""
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger(name)
    handler.emit = records.append  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(before if level is None else level)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
