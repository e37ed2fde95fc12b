"""docs/troubleshooting.md quotes what this package really says and names real checks; an error itself says what to do.

An error carries its own remedy, so the page need not repeat it. A warning is one line: the page explains each.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import megatron_ep_v2
from megatron_ep_v2 import errors, settings

PACKAGE = Path(megatron_ep_v2.__file__).parent
TEXT = (PACKAGE.parent / "docs" / "troubleshooting.md").read_text()
KINDS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}

# What an error happened with -> why it needs neither a `fix:` nor a `needed:` line. None does so far.
WITHOUT_A_REMEDY: dict[str, str] = {}


def quoted(section: str) -> list[str]:
    """The messages that are headings of a section of the page."""
    return re.findall(r"^### `(.+)`$", TEXT.partition(f"## {section}\n")[2].partition("\n## ")[0], re.MULTILINE)


def text_of(node: ast.expr | None) -> str | None:
    """A string as a reader sees it, "…" for each part that varies; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdg]", "…", node.value)  # as logging formats it
    return None


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    """(file, node) of everything in the package's sources."""
    trees = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    return [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]


def calls(names: set[str]) -> Iterator[tuple[str, ast.Call]]:
    """(file, call) of each call of a function or class with one of these names."""
    for file, node in nodes():
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in names:
            yield file, node


def said(names: set[str]) -> set[str]:
    """The texts of these errors, or of these methods of loggers."""
    return {text for _, call in calls(names) if call.args and (text := text_of(call.args[0]))}


def remedies(call: ast.Call) -> set[str]:
    """Those of an error's lines that help its reader, where they are not empty."""
    given = {word.arg for word in call.keywords if not (isinstance(word.value, ast.Constant) and not word.value.value)}
    return {"fix", "needed"} & given


def test_every_quoted_message_is_in_the_source() -> None:
    ours = quoted("From this package")
    assert len(ours) > 10
    assert sorted(set(ours) - said(KINDS) - said({"warning"})) == []


def test_the_watchdogs_words_are_in_the_source() -> None:
    words = {text.strip() for file, node in nodes() if file.startswith("watchdog") and (text := text_of(node))}
    assert len(quoted("From the watchdog")) > 0
    assert sorted(set(quoted("From the watchdog")) - words) == []


def test_every_warning_is_quoted() -> None:
    assert sorted(said({"warning"}) - set(quoted("From this package"))) == []


def test_every_error_says_what_to_do() -> None:
    errors_of_the_package = list(calls(KINDS))
    assert len(errors_of_the_package) > 100
    silent = {
        text_of(call.args[0]) or f"line {call.lineno} of {file}"
        for file, call in errors_of_the_package
        if not remedies(call)
    }
    assert sorted(silent) == sorted(WITHOUT_A_REMEDY)


def test_the_checks_exist_and_each_is_named() -> None:
    sources = [path.read_text() for path in (PACKAGE / "doctor").glob("*.py")]
    names = {name for source in sources for name in re.findall(r"@checks\.add\(\"(.+?)\"", source)} | {"trial"}
    claims = re.findall(r"\*\*Doctor\*\*((?:[,\s]*(?:and )?`[^`]+`)+)", TEXT)
    claimed = {name for claim in claims for name in re.findall("`(.+?)`", claim)}
    assert claimed == names


def test_the_variables_exist() -> None:
    ours = {settings.variable(name) for name in settings.NAMES}
    assert set(re.findall(r"MCORE_DEEPEP_V2_\w+", TEXT)) <= ours
