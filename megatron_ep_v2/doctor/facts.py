"""All facts about an environment as JSON-able values: the host's, and those from imports in other processes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_ep_v2 import __version__, cuda_toolkit
from megatron_ep_v2.doctor.host import read_host, read_toolkit
from megatron_ep_v2.doctor.imports import STEPS
from megatron_ep_v2.doctor.packages import Facts, generation

SECONDS = 300  # time limit for a process of imports; slow shared file systems take a minute


def gather() -> Facts:
    """Gather all facts. Takes as long as importing Megatron-Core.

    Returns:
        The host's facts (`host.read_host`), "toolkit" (`host.read_toolkit`), and the result of each step of imports.py
        ({} = not installed), or {"failure": {"how": in one line, "stderr": its end}} if the step ended its process.
    """
    cuda_toolkit.provide()
    facts = {"megatron_ep_v2": __version__, **read_host(), **_look_at_imports()}
    environment = {**facts["environment"], **facts["probe"].get("environment", {})}
    return {**facts, "toolkit": read_toolkit(environment, generation(facts))}


def _look_at_imports() -> Facts:
    """Facts of every step. If a step ends its process, that is recorded, and a new process runs the remaining steps."""
    found: Facts = {}
    hidden: list[str] = []
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        report = Path(folder, "report")
        while left := [step for step in STEPS if step not in found]:
            report.write_text("")
            how, stderr = _run("megatron_ep_v2.doctor.imports", str(report), *hidden, *left)
            for line in report.read_text().splitlines():
                found |= json.loads(line)
            if missed := [step for step in left if step not in found]:
                found[missed[0]] = {"failure": {"how": how, "stderr": stderr[-4000:]}}
                hidden.append(f"-{missed[0]}")
    return found


def _run(*module: str) -> tuple[str, str]:
    """Run a module; returns how its process ended, and its stderr."""
    command = [sys.executable, "-m", *module]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        return f"not done after {SECONDS} s", (error.stderr or b"").decode(errors="replace")
    stderr = done.stderr.decode(errors="replace")
    return describe_end(done.returncode, stderr), stderr


def describe_end(code: int, stderr: str) -> str:
    """Describe in one line how a process ended: the error of its traceback, else its signal or exit code."""
    if code < 0:
        return f"killed the process ({signal.Signals(-code).name})"
    lines = re.sub(r"^\[rank\d+\]: ", "", stderr, flags=re.MULTILINE)  # torch marks its ranks' tracebacks so
    after = lines.rpartition("Traceback (most recent call last):")[2].splitlines()[1:]
    errors = [line for line in after if line and not line.startswith(" ")]
    return errors[0] if errors else f"ended the process (exit code {code})"
