"""`python -m megatron_ep_v2 patch apply|revert|check [PATH]`: a Megatron that needs no `install()` call.

A patch of `patches/` adds a hook to one file of Megatron. If this package is installed, the hook calls `install()`
before a MoE layer with the flex dispatcher of backend "deepep" is built; else it does nothing. The files are plain
unified diffs, which `git apply` and `patch` accept too; here they are applied to the exact text or not at all.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_ep_v2 import versions
from megatron_ep_v2.cli.run import UsageError
from megatron_ep_v2.errors import SeamError, SettingsError

_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = (_PACKAGE / "patches", _PACKAGE.parent / "patches")  # as installed, and in the source tree
_ACTIONS = ("apply", "revert", "check")


@dataclass(frozen=True)
class Patch:
    """A unified diff of one file.

    Attributes:
        name: File name of the patch.
        path: The file that it changes, relative to the folder that holds `megatron/`.
        hunks: (text before, text after) of each hunk, with its context; whole lines.
    """

    name: str
    path: str
    hunks: tuple[tuple[bytes, bytes], ...]

    @classmethod
    def read(cls, file: Path) -> Patch:
        """Parse one of this package's own files; tests check that they are well-formed."""
        head, *hunks = re.split(rb"^@@.*\n", file.read_bytes(), flags=re.MULTILINE)
        (path,) = re.findall(rb"^\+\+\+ b/(\S+)$", head, flags=re.MULTILINE)
        return cls(file.name, path.decode(), tuple((_side(hunk, b"-"), _side(hunk, b"+")) for hunk in hunks))

    def turn(self, content: bytes, *, back: bool = False) -> bytes | None:
        """Apply the patch (or revert it) to a file's content; None unless each hunk's text occurs exactly once."""
        for before, after in self.hunks:
            old, new = (after, before) if back else (before, after)
            matches = [match.start() for match in re.finditer(rb"^" + re.escape(old), content, flags=re.MULTILINE)]
            if len(matches) != 1:
                return None
            content = content[: matches[0]] + new + content[matches[0] + len(old) :]
        return content


@dataclass(frozen=True)
class Found:
    """A patch that fits a Megatron or is applied to it.

    Attributes:
        file: The file in that Megatron.
        other: Content of the file with the patch, or without it if it is applied.
    """

    patch: Patch
    applied: bool
    file: Path
    other: bytes


def patch(arguments: list[str]) -> int:
    """Run the command; see the module's docstring.

    Args:
        arguments: An action, and the folder that holds `megatron/`: a Megatron-LM source tree or site-packages.
            Without one, the Megatron that this Python imports.

    Returns:
        Exit status of `check`: 0 if the patch is applied, 1 if it fits but is not applied. Else 0.

    Raises:
        SettingsError: The action is unknown, there is no Megatron at that path, or its file cannot be written.
        SeamError: No patch fits; nothing was changed.
    """
    action, *rest = arguments or [""]
    if action not in _ACTIONS or len(rest) > 1:
        raise UsageError(
            f"cannot {' '.join(arguments)!r}" if arguments else "nothing to do",
            needed="apply, revert or check, and at most one path",
            fix="python -m megatron_ep_v2 patch check",
        )
    found = find(Path(rest[0]) if rest else installed_megatron())
    if action != "check" and found.applied == (action == "revert"):
        _write(found.file, found.other)
        state = "is no longer applied to" if found.applied else "is now applied to"
    else:
        state = "is applied to" if found.applied else "fits, but is not applied to"
    print(f"{found.patch.name} {state} {found.file}")
    return int(action == "check" and not found.applied)


def installed_megatron() -> Path:
    """Find the folder of the `megatron` that this Python would import, without importing it."""
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise SettingsError(
            "there is no megatron.core to patch",
            found="none on this Python's path",
            fix="give the folder that holds megatron/, or pip install megatron-core",
        )
    return Path(spec.origin).resolve().parents[2]


def find(root: Path) -> Found:
    """Find the patch that is applied to the Megatron in `root`, or else one that fits it.

    Raises:
        SettingsError: There is no `megatron/core` in `root`.
        SeamError: There is neither; the message gives the reason for each patch.
    """
    if not (root / "megatron" / "core").is_dir():
        raise SettingsError(
            f"there is no Megatron in {root}",
            needed="a folder that holds megatron/core: a Megatron-LM source tree or site-packages",
            fix="give that folder's path, or none for the Megatron that this Python imports",
        )
    patches = load_patches()
    refusals = []
    for applied in (True, False):
        for one in patches:
            file = root / one.path
            content = file.read_bytes() if file.is_file() else None
            other = one.turn(content, back=applied) if content is not None else None
            if other is not None:
                return Found(one, applied, file.resolve(), other)
            refusals.append(f"{one.name}: {_refusal(content, one)}")
    raise SeamError(
        f"no patch fits the Megatron in {root}; nothing was changed",
        found="; ".join(dict.fromkeys(refusals)),
        needed=f"megatron-core {versions.MEGATRON_CORE}, its moe_layer.py as released",
        fix="call megatron_ep_v2.install() or start with `-m megatron_ep_v2 run`; or a newer megatron_ep_v2",
    )


def load_patches() -> list[Patch]:
    """All patches of this package."""
    folder = next(folder for folder in _FOLDERS if folder.is_dir())
    return [Patch.read(file) for file in sorted(folder.glob("*.patch"))]


def _side(hunk: bytes, sign: bytes) -> bytes:
    """The lines of one side of a hunk: those with its sign, and the context."""
    lines = hunk.splitlines(keepends=True)
    return b"".join(line[1:] for line in lines if line[:1] in (b" ", sign))


def _refusal(content: bytes | None, one: Patch) -> str:
    if content is None:
        return f"there is no {one.path}"
    if b"megatron_ep_v2" in content:
        return f"{one.path} already names megatron_ep_v2, but not as the patch does"
    return f"{one.path} does not have the lines that it changes exactly once"


def _write(file: Path, content: bytes) -> None:
    """Replace a file atomically by a new one: installers such as uv share files with their cache through hard links."""
    temporary = file.with_name(file.name + ".megatron_ep_v2")
    try:
        temporary.write_bytes(content)
        shutil.copymode(file, temporary)
        os.replace(temporary, file)
    except OSError as error:
        raise SettingsError(
            f"cannot write {file}", found=str(error), fix="run this as the user who owns the folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
