"""README.md, CONTRIBUTING.md and docs/: every file that they name is there, and the README has every setting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_ep_v2 import settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "benchmarks|docker|docs|examples|megatron_ep_v2|patches|tests"
NAMED = re.compile(rf"(?<![\w/.-])(?<!--out )((?:{FOLDERS})/[\w/.-]+\.\w+)\b")
LINKED = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    named = [ROOT / name for name in NAMED.findall(text)] + [page.parent / name for name in LINKED.findall(text)]
    assert [str(path) for path in named if not path.exists()] == []


def test_the_readme_has_every_setting_with_its_default() -> None:
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \| ([^|]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    defaults = settings.resolve({})
    told = {}
    for names, variables, values in rows:
        for name, value in zip(re.findall(r"`(\w+)`", names), [*values.split(", "), values.strip()], strict=False):
            told[name] = value.strip()
            assert settings.variable(name) in variables or variables.strip().endswith("..."), name
    shown = {True: "on", False: "off"}
    wanted = {}
    for name in settings.NAMES:
        value = getattr(defaults, name)
        wanted[name] = shown[value] if isinstance(value, bool) else str(value)
    wanted["num_max_tokens_per_rank"] = "agreed"
    assert told == wanted
