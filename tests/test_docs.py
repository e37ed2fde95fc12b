"""The pages: every file, heading and Python name in them is there, and every setting has its row."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path

import pytest

from megatron_ep_v2 import settings

ROOT = Path(__file__).parents[1]
FOLDERS_WITH_PAGES = (".", "docs", "examples", "benchmarks/results")
PAGES = [page for folder in FOLDERS_WITH_PAGES for page in sorted((ROOT / folder).glob("*.md"))]
FOLDERS = "benchmarks|docker|docs|examples|megatron_ep_v2|patches|tests"
NAMED = re.compile(rf"(?<![\w/.-])(?<!--out )((?:{FOLDERS})/[\w/.-]+\.\w+)\b")
LINKED = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: small letters, no punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    named = [ROOT / name for name in NAMED.findall(text)] + [page.parent / name for name, _ in LINKED.findall(text)]
    assert [str(path) for path in named if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_the_package_exist(page: Path) -> None:
    for name in sorted(set(re.findall(r"\bmegatron_ep_v2(?:\.[A-Za-z_]\w*)+", page.read_text()))):
        module, _, function = name.partition(".auto")
        if module == "megatron_ep_v2" and function[:1] in ("", "."):  # an import would bind this process
            source = ast.parse((ROOT / "megatron_ep_v2" / "auto.py").read_text())
            assert function in {"", *(f".{node.name}" for node in source.body if isinstance(node, ast.FunctionDef))}
        else:
            pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_headings_that_are_linked_exist(page: Path) -> None:
    links = [
        (page.parent / name if name else page, anchor) for name, anchor in LINKED.findall(page.read_text()) if anchor
    ]
    assert [f"{path}#{anchor}" for path, anchor in links if anchor not in headings(path)] == []


def test_the_settings_page_has_every_setting_with_its_variable_and_default() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| ([^|]+) \| \S", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE
    )
    assert len({name for name, _, _ in rows}) == len(rows), "a setting has one row"
    defaults = settings.resolve({})
    shown = {True: "on", False: "off"}
    wanted = {}
    for name in settings.NAMES:
        value = getattr(defaults, name)
        wanted[name] = (settings.variable(name), shown[value] if isinstance(value, bool) else str(value))
    wanted["num_max_tokens_per_rank"] = (settings.variable("num_max_tokens_per_rank"), "agreed")
    assert {name: (variable, default) for name, variable, default in rows} == wanted


def test_the_lab_notebook_has_every_file_of_rows() -> None:
    results = ROOT / "benchmarks" / "results"
    linked = {results / name for name, _ in LINKED.findall((results / "README.md").read_text())}
    assert sorted(set(results.rglob("*.jsonl")) - linked) == []
