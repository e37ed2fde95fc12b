"""Scripts in an interpreter of their own, and whether Triton is there to be asked."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.harness import HANG
from tests.helpers.paths import PYTHONPATH

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def child(source: str, **environ: str) -> Any:
    """Run a script of its own interpreter; its last line is JSON."""
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, **environ}
    command = [sys.executable, "-W", "ignore", "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
