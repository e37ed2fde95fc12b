"""The words of CONTRIBUTING.md's glossary: sources and pages use none of the retired ones in prose."""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_ep_v2

ROOT = Path(megatron_ep_v2.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

RETIRED = {
    r"picks?|picked": "selection, select",
    r"told": "gathered, reported, detected",
    r"beliefs?|believed?": "facts",
    r"behind": "after",
    r"beside": "next to, overlaps with",
    r"nobody|somebody|everybody|anybody|whoever": "name the rank or the code; unowned",
    r"anew": "again",
    r"mends?|mended": "fix, repair",
    r"hence": "so",
    r"seams?": "symbols",
    r"meetings?": "rendezvous",
    r"deferred": "device check",
    r"(does|do|did|has|have) not come": "does not arrive",
}
# In sources only: in the pages a place is also a place.
RETIRED_IN_SOURCES = RETIRED | {r"(?<!in )places?": "slot"}
ALLOWED = {
    # The exported name, and the argument of the functions that take one.
    *(("megatron_ep_v2/layouts/__init__.py", "Places"), ("megatron_ep_v2/layouts/payload.py", "places")),
    *(("megatron_ep_v2/layouts/rows.py", "Places"), ("megatron_ep_v2/layouts/rows.py", "places")),
    ("tests/helpers/layout_kernels.py", "place"),
    # Names in rows of benchmarks/results.
    *(("benchmarks/gpu_fp8.py", "place"), ("benchmarks/gpu_sync_free.py", "places")),
    *(("benchmarks/gpu_layouts.py", "places"), ("benchmarks/gpu_layouts.py", "picks")),
    ("tests/bench/test_bench_runner.py", "places"),
}

CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of each comment and string, without code in backticks."""
    with open(path) as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
                text = token.string
                if token.type == tokenize.STRING and "f" in text.partition(text[-1])[0].lower():
                    text = re.sub(r"\{[^{}]*\}", "", text)  # before Python 3.12 an f-string is one token
                yield token.start[0], CODE.sub(lambda found: "\n" * found[0].count("\n"), text)


def retired_in(text: str, words: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    """(lines before it, word, what to write instead) of each retired word in a text."""
    for pattern, instead in words.items():
        for found in re.finditer(rf"(?<![\w./-])(?:{pattern})(?![\w/-])", text, re.IGNORECASE):
            yield text.count("\n", 0, found.start()), found[0], instead


@pytest.mark.parametrize("folder", ["megatron_ep_v2", "tests", "benchmarks"])
def test_sources_have_no_retired_word(folder: str) -> None:
    faults = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path == Path(__file__):
            continue
        name = path.relative_to(ROOT).as_posix()
        for line, text in prose(path):
            for offset, word, instead in retired_in(text, RETIRED_IN_SOURCES):
                if (name, word) not in ALLOWED:
                    faults.append(f"{name}:{line + offset}: {word} -> {instead}")
    assert faults == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_no_retired_word(page: Path) -> None:
    text = re.sub(r"^## Words$.*?(?=^## )", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = CODE.sub(lambda found: "\n" * found[0].count("\n"), text)
    assert [f"{word} -> {instead}" for _, word, instead in retired_in(text, RETIRED)] == []


def test_a_retired_word_is_found(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""Rows of\nnobody."""\n\nplaces = 1  # a place in `picks`, changed in place\nf"not told {places}"\n'
    )
    found = []
    for line, text in prose(file):
        found += [(line + offset, word) for offset, word, _ in retired_in(text, RETIRED_IN_SOURCES)]
    assert sorted(found) == [(2, "nobody"), (4, "place"), (5, "told")]
