"""Job: wait_in_step.py STEP FILE SCRIPT ARGS... is the example's SCRIPT, whose second rank makes FILE in that step and
waits as long as it is there. Where it was there before, the rank goes on."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import Any

step_to_wait_in, file, script = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
sys.argv = sys.argv[3:]
sys.path[0] = str(Path(script).parent)

from qwen3_moe import loop  # noqa: E402 - found from here on

theirs = loop.train_batches


def train_batches(samples: Any, options: Any, step: int, rank: int, world: int) -> Any:
    if rank == 1 and step + 1 == step_to_wait_in and not file.exists():
        file.touch()
        while file.exists():
            time.sleep(0.05)
    return theirs(samples, options, step, rank, world)


loop.train_batches = train_batches
runpy.run_path(script, run_name="__main__")
