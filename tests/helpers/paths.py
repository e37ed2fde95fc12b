"""Where things are in the source tree, and what a process needs to import them."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "tests" / "jobs"  # scripts that tests start in processes of their own
PYTHONPATH = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "examples", ROOT / "benchmarks"))
