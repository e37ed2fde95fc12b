"""Scripts in a process of their own, and whether Triton is there to be asked."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import python
from tests.helpers.harness import HANG
from tests.helpers.paths import PYTHONPATH

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def child(source: str, **environ: str) -> Any:
    """Run a script in a process of its own; its last line is JSON. It is a new interpreter where Triton has to see a
    variable when it is imported; a forked one has imported it."""
    if "TRITON_INTERPRET" in environ:
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH, **environ}
        command = [sys.executable, "-W", "ignore", "-c", source]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment, check=False)
    else:
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "script.py")
            script.write_text(source)
            done = python(str(script), **environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
