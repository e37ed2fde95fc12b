"""`python -m megatron_ep_v2 auto enable|disable|status`: each Python of this environment binds Megatron by itself.

`enable` writes a file of one line into site-packages. Python executes it at each start; where MCORE_DEEPEP_V2_AUTO is
on, it imports `megatron_ep_v2.auto`, else nothing. `disable` removes the file.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from megatron_ep_v2 import settings
from megatron_ep_v2.cli.patch import installed_megatron
from megatron_ep_v2.cli.run import UsageError
from megatron_ep_v2.errors import SettingsError

NAME = "megatron_ep_v2_auto.pth"
_ACTIONS = ("enable", "disable", "status")

# What the line executes where the variable is not off. A value that is neither on nor off is refused by `install()`.
# The file outlives the package: pip does not know it. An interpreter that starts must not fail, whatever is missing.
# In a virtual environment Python may read it twice at one start.
_START = f"""\
try:
 from megatron_ep_v2 import auto
 auto.by = {settings.AUTO!r}
except Exception as error:
 import sys
 if not hasattr(sys, "megatron_ep_v2_auto"):
  sys.megatron_ep_v2_auto = "megatron_ep_v2: {settings.AUTO} is set, but Megatron will not be bound to this package"
  print(sys.megatron_ep_v2_auto, file=sys.stderr)
  print(f"  found: {{type(error).__name__}}: {{error}}", file=sys.stderr)
  print(f"  fix: pip install it into {{sys.prefix}}, unset the variable, or remove {NAME} there", file=sys.stderr)
"""
# Python executes the lines of such a file that begin with "import".
LINE = (
    f'import os; os.environ.get("{settings.AUTO}", "").strip().lower() in ("", "0", "false", "off") '
    f"or exec({_START!r}, {{}})\n"
)


def auto(arguments: list[str]) -> int:
    """Run the command; see the module's docstring.

    Returns:
        Exit status of `status`: 0 if a Python started here, with these variables, would bind Megatron, else 1. Else 0.

    Raises:
        SettingsError: The action is unknown, the file cannot be written or removed, or has no effect.
    """
    if len(arguments) != 1 or arguments[0] not in _ACTIONS:
        raise UsageError(
            f"cannot auto {' '.join(arguments)!r}" if arguments else "nothing to do",
            needed="enable, disable or status",
            fix="python -m megatron_ep_v2 auto status",
        )
    file = Path(sysconfig.get_path("purelib")) / NAME
    return {"enable": _enable, "disable": _disable, "status": _status}[arguments[0]](file)


def _enable(file: Path) -> int:
    _check_ours(file)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")  # not .pth: interpreters that start now must not read it
    try:
        temporary.write_text(LINE)
        os.replace(temporary, file)
    except OSError as error:
        raise _cannot("write", file, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    if refusal := _refusal():
        file.unlink(missing_ok=True)
        raise SettingsError(
            "a new interpreter of this environment would not import megatron_ep_v2.auto; the file was removed again",
            found=refusal,
            needed=f"megatron_ep_v2 installed for {sys.executable}, not only in the current folder",
            fix="pip install it into this environment; or let the job itself import megatron_ep_v2.auto",
        )
    print(f"wrote {file}\nProcesses of this environment bind Megatron by themselves where {settings.AUTO}=1 is set.")
    return 0


def _disable(file: Path) -> int:
    _check_ours(file)
    there = file.exists()
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot("remove", file, error) from error
    print(f"removed {file}" if there else f"there is no {file}")
    for other in _files(file):
        print(f"this Python also reads {other}: disable that one with the Python it belongs to")
    return 0


def _status(file: Path) -> int:
    refusal = _refusal()
    try:
        on, variable = settings.automatic(), None
    except SettingsError as error:
        on, variable = False, f"{error.what}; needed: {error.needed}"
    try:
        megatron = f"in {installed_megatron()}"
    except SettingsError:
        megatron = "not on this Python's path (a job may bring its own)"
    lines = {
        "file": ", ".join(map(str, _files(file))) or f"absent: {file}",
        "variable": variable or f"{settings.AUTO} is {'on' if on else 'off, or not set'}",
        "at its start": refusal or f"a new interpreter ({sys.executable}) follows it",
        "Megatron": megatron,
    }
    if refusal is not None:
        conclusion = "no: python -m megatron_ep_v2 auto enable"
    elif not on:
        conclusion = f"no: set {settings.AUTO}=1"
    else:
        conclusion = "yes, once Megatron's dispatcher is imported"
    print(*(f"{name:<12}  {text}" for name, text in lines.items()), f"binds now: {conclusion}", sep="\n")
    return int(refusal is not None or not on)


def _files(file: Path) -> list[Path]:
    """Our file, and others of its name that this Python reads: a virtual environment may include a system's."""
    folders = [file.parent, *map(Path, site.getsitepackages()), Path(site.getusersitepackages())]
    return [path for folder in dict.fromkeys(folders) if (path := folder / NAME).exists()]


def _refusal() -> str | None:
    """Why a new interpreter with the variable on does not import `megatron_ep_v2.auto`; None if it does."""
    with settings.environment(**{settings.AUTO: "1"}):
        command = [sys.executable, "-c", "import sys; print('megatron_ep_v2.auto' in sys.modules)"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout.split()[-1:] == ["True"]:
        return None
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in said if line.startswith("found: ")), "").removeprefix("found: ") or (
        f"a new interpreter ({sys.executable}) executes no {NAME}"
    )


def _check_ours(file: Path) -> None:
    """Raise for a file of that name that this command did not write."""
    if file.exists() and settings.AUTO not in file.read_text(errors="replace"):
        raise SettingsError(
            f"{file} was not written by this command; it was left as it is",
            needed=f"a file that reads {settings.AUTO}",
            fix="remove it by hand if it is not needed",
        )


def _cannot(what: str, file: Path, error: OSError) -> SettingsError:
    return SettingsError(
        f"cannot {what} {file}",
        found=str(error),
        fix="run this as the user who owns the environment, or use a virtual environment; "
        "or let the job itself import megatron_ep_v2.auto",
    )
