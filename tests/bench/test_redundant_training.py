"""The skewed corpus, and the script that trains on it with and without redundant experts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.bench.test_bench import ROOT
from tests.helpers.commands import python
from tests.helpers.stacks import on_one_stack


def test_words_of_the_skewed_corpus_are_as_frequent_as_asked_for(tmp_path: Path) -> None:
    texts = {}
    for name, more in {"one": [], "again": [], "other": ["--seed", "1"]}.items():
        file = tmp_path / f"{name}.txt"
        options = ["--words", "5", "--exponent", "2", "--kilobytes", "40", *more]
        done = python(str(ROOT / "examples" / "skewed_corpus.py"), str(file), *options)
        assert done.returncode == 0, done.stderr
        texts[name] = file.read_text()
    assert texts["one"] == texts["again"] != texts["other"]
    assert len(texts["one"]) == 40_000
    counts = [number for _, number in Counter(texts["one"].split()).most_common(5)]
    total = sum(1 / n**2 for n in range(1, 6))
    for n, number in enumerate(counts, start=1):
        wanted = sum(counts) / n**2 / total
        assert abs(number - wanted) < 5 * wanted**0.5


@pytest.mark.slow
@on_one_stack
def test_training_with_and_without_redundant_experts_in_one_picture(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    small = ["--steps", "3", "--num-layers", "1", "--seq-length", "64", "--global-batch-size", "8"]
    small += ["--balance-min-rows", "1", "--dtype", "fp32", "--log-every", "1"]
    done = python("benchmarks/redundant_training.py", "--out", str(out), *small, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    header, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert header["environment"] and header["command"].startswith("python benchmarks/redundant_training.py --out")
    runs = ["without redundant experts", "2 replica slots"]
    assert [row["run"] for row in rows] == [name for name in runs for _ in range(4)]
    plain, ours = ([row for row in rows if row["run"] == name and "loss" in row] for name in runs)
    for one, other in zip(plain, ours, strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-4 * one["loss"]
    assert max(row["overload_mean"] for row in ours) < 1.1 < max(row["overload_mean"] for row in plain)
    assert all(row["summary"]["data"].startswith("skewed.txt: ") for row in rows if "summary" in row)
    picture = out.with_suffix(".svg").read_text()
    assert picture.count('id="axes_') == 3  # overload, step time, loss
    assert "mean overload" in done.stdout
