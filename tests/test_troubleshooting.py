"""docs/troubleshooting.md: it quotes what this package really says, leaves out no error, and names real checks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import megatron_ep_v2
from megatron_ep_v2 import errors, settings

PACKAGE = Path(megatron_ep_v2.__file__).parent
TEXT = (PACKAGE.parent / "docs" / "troubleshooting.md").read_text()
OURS = re.findall(r"^### `(.+)`$", TEXT.partition("## From this package")[2].partition("\n## ")[0], re.MULTILINE)
KINDS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}


def text_of(node: ast.expr | None) -> str | None:
    """A string as a reader sees it, "…" for each part that varies; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdg]", "…", node.value)  # as logging formats it
    return None


def said() -> Iterator[tuple[str, bool]]:
    """(text, whether it is an error) of each error and warning of the package; the commands explain themselves."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and (text := text_of(node.args[0])):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in KINDS and path.parent.name not in ("cli", "bench"):
                    yield text, True
                elif name == "warning":
                    yield text, False


def test_every_quoted_message_is_in_the_source() -> None:
    texts = {text for text, _ in said()}
    assert len(OURS) > 30
    assert [quote for quote in OURS if quote not in texts] == []


def test_every_message_of_the_source_is_quoted() -> None:
    assert sorted({text for text, _ in said()} - set(OURS)) == []


def test_the_checks_exist_and_each_is_named() -> None:
    sources = [path.read_text() for path in (PACKAGE / "doctor").glob("*.py")]
    names = {name for source in sources for name in re.findall(r"@checks\.add\(\"(.+?)\"", source)} | {"trial"}
    claims = re.findall(r"\*\*Doctor\*\*((?:[,\s]*(?:and )?`[^`]+`)+)", TEXT)
    claimed = {name for claim in claims for name in re.findall("`(.+?)`", claim)}
    assert claimed == names


def test_the_variables_exist() -> None:
    ours = {settings.variable(name) for name in settings.NAMES}
    assert set(re.findall(r"MCORE_DEEPEP_V2_\w+", TEXT)) <= ours
