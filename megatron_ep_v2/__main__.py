"""Command line: `megatron-ep-v2 COMMAND ...`, or `python -m megatron_ep_v2 COMMAND ...`."""

from __future__ import annotations

import importlib
import sys

from megatron_ep_v2.cli import prog
from megatron_ep_v2.cli.run import UsageError
from megatron_ep_v2.errors import EPError

_USAGE = """usage: {prog} COMMAND ...

  run SCRIPT ARGS...   run a training script with Megatron's flex dispatcher on this package
  patch apply|revert|check [PATH]
                       make the Megatron in PATH (default: the installed one) do so by itself
  auto enable|disable|status
                       let each Python of this environment do so by itself where MCORE_DEEPEP_V2_AUTO=1
  doctor [--json] [--ranks N]
                       report what is wrong with this environment; with --ranks, try it on N processes
  train [ARGS...]      train a small Qwen3-MoE here: on all GPUs, or on the CPU with two processes (train --help)
  bench                time Megatron's dispatchers side by side on this machine (bench --help)
  what-if FILE         what redundant experts would do to recorded expert loads (what-if --help)"""

# Each takes its arguments and returns the exit status, None for 0. Imported lazily: some work without torch.
_COMMANDS = {
    "run": "cli.run:run",
    "patch": "cli.patch:patch",
    "auto": "cli.auto:auto",
    "doctor": "cli.doctor:doctor",
    "train": "cli.train:train",
    "bench": "cli.bench:main",
    "what-if": "cli.what_if:what_if",
}


def main() -> None:
    """Run a command; print the usage for anything else."""
    command, *rest = sys.argv[1:] or ["--help"]
    usage = _USAGE.format(prog=prog())
    if command in ("-h", "--help"):
        print(usage)
        return
    if command not in _COMMANDS:
        raise SystemExit(f"unknown command {command!r}\n\n{usage}")
    module, _, function = _COMMANDS[command].partition(":")
    try:
        status = getattr(importlib.import_module(f"megatron_ep_v2.{module}"), function)(rest)
    except UsageError as error:
        raise SystemExit(f"{error}\n\n{usage}") from error
    except EPError as error:
        if command == "run":  # raised in the user's script: keep the traceback
            raise
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    sys.exit(status)


if __name__ == "__main__":
    main()
