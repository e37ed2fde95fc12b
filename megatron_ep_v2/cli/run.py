"""`python -m megatron_ep_v2 run SCRIPT ARGS...`: call install(), then run the unchanged script with its arguments."""

from __future__ import annotations

import importlib.util
import logging
import os
import runpy
import sys
from pathlib import Path

import megatron_ep_v2
from megatron_ep_v2.errors import EPError, SettingsError
from megatron_ep_v2.settings import is_first_rank


class UsageError(SettingsError):
    """The command's arguments are invalid."""


def run(arguments: list[str]) -> None:
    """Run a training script with Megatron's flex dispatcher on this package.

    The script sees sys.argv, sys.path[0] and __name__ as if Python had been started with it, so that a Megatron-LM
    source tree next to it is imported before an installed megatron-core. Works under torchrun:

        torchrun --nproc-per-node 8 -m megatron_ep_v2 run pretrain_gpt.py ...

    Args:
        arguments: The script's path and its own arguments; or -m, a module's name and its arguments.

    Raises:
        SettingsError: No script was given, or its path is no file.
        EPError: From `install()`; the script did not run.
    """
    as_module = arguments[:1] == ["-m"]
    script, *rest = (arguments[1:] if as_module else arguments) or [""]
    kind = "module" if as_module else "script"
    if not script or not (_is_module(script) if as_module else Path(script).is_file()):
        raise UsageError(
            f"no {kind} to run" if not script else f"there is no {kind} {script}",
            needed="the path of a Python file, or -m MODULE",
            fix="python -m megatron_ep_v2 run pretrain_gpt.py --moe-token-dispatcher-type flex ...",
        )
    if not getattr(sys.flags, "safe_path", False):  # with safe_path, sys.path[0] is not the script's folder
        sys.path[0] = os.getcwd() if as_module else str(Path(script).resolve().parent)
    sys.argv = [script, *rest]
    logger = logging.getLogger("megatron_ep_v2")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    try:
        megatron_ep_v2.install()
    except EPError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if as_module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False
