"""A line with the time before each slow phase, on standard error: where a log breaks off, it says what was running."""

from __future__ import annotations

import sys
import time
from typing import Any


def say(text: str, group: Any = None) -> None:
    """group: in the ranks of this process group, rank 0 alone says it; None = the caller does."""
    if group is None or group.rank() == 0:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
