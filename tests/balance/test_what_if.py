"""What redundant experts would do to recorded loads: by hand, and what is no recording."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_ep_v2.balance.what_if import predict, recorded, step_gain, to_line
from megatron_ep_v2.errors import EPError, SettingsError
from tests.helpers.commands import python

# Two micro-batches, two layers, two ranks of two experts. Layer 0 is 2100 : 900, then 900 : 2100; layer 1 is even.
LOADS = torch.tensor(
    [[[[1800, 300], [500, 400]], [[700, 800], [900, 600]]], [[[500, 400], [1800, 300]], [[750, 750], [750, 750]]]]
)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A file of two steps, a micro-batch each."""
    file = tmp_path / "expert_load.jsonl"
    file.write_text("".join(to_line(step + 1, LOADS[step : step + 1]) for step in range(2)))
    return file


def test_a_recording_is_what_was_written(recording: Path) -> None:
    first = json.loads(recording.read_text().splitlines()[0])
    assert first == {"step": 1, "ranks": 2, "expert_load": [[[1800, 300, 500, 400], [700, 800, 900, 600]]]}
    assert recorded(recording).equal(LOADS)


def test_predictions_by_hand() -> None:
    layers, together = predict(LOADS, [0, 1], min_rows=1, from_percent=110)
    found = [[(each.mean, each.largest, each.replicas) for each in layer] for layer in layers]
    assert found == [[(1.4, 1.4, 0.0), (1.0, 1.0, 1.0)], [(1.0, 1.0, 0.0), (1.0, 1.0, 0.0)]]
    assert [(each.mean, each.largest, each.replicas) for each in together] == [(1.2, 1.4, 0.0), (1.0, 1.0, 0.5)]
    _, together = predict(LOADS, [0, 1], min_rows=601, from_percent=110)  # 600 rows are too few
    assert together[1].mean == 1.2
    assert step_gain(2.0, 1.0, 0.4) == pytest.approx(0.4) and step_gain(1.3, 1.1, 0.5) == pytest.approx(1.15 / 1.05 - 1)


def test_two_slots_where_one_is_not_enough() -> None:
    """Four experts of 300 on rank 0: a replica takes one of them, which leaves 900 of 1200 there."""
    loads = torch.tensor([[[[300, 300, 300, 300], [0, 0, 0, 0]]]])
    _, together = predict(loads, [0, 1, 2], min_rows=1, from_percent=110)
    assert [each.mean for each in together] == [2.0, 1.5, 1.0]
    assert [each.replicas for each in together] == [0.0, 1.0, 2.0]


def test_the_table_and_the_document(recording: Path) -> None:
    done = python("-m", "megatron_ep_v2", "what-if", str(recording), "--min-rows", "1")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.stdout.startswith(f"{recording}: 2 micro-batches, 2 layers, 4 experts, 2 ranks\n")
    assert lines[2] == ["layer", "0", "1.40", "(1.40)", "1.00", "(1.00)", "1.00", "(1.00)"]
    assert lines[4] == ["all", "layers", "1.20", "(1.40)", "1.00", "(1.00)", "1.00", "(1.00)"]
    assert lines[5] == ["replicas", "a", "layer", "0.0", "0.5", "0.5"]
    assert lines[6] == ["step", "+10.0%", "+10.0%"]
    done = python("-m", "megatron_ep_v2", "what-if", str(recording), "--json", "--slots", "1", "--share", "0.4")
    document = json.loads(done.stdout)
    assert [each["step_gain"] for each in document["all"]] == [0.0, 0.0]  # no 1024 rows to move
    assert [each["mean"] for each in document["layers"][0]] == [1.4, 1.4]
    assert "nothing was planned" in python("-m", "megatron_ep_v2", "what-if", str(recording)).stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read as one recording"),
        ("{}", "KeyError"),
        ("not JSON", "JSONDecodeError"),
        ('{"ranks": 2, "expert_load": [[[1, 2, 3]]]}', "is no line of a recording"),
        ('{"ranks": 2, "expert_load": [[[1.5, 2.5]]]}', "float32"),
        ('{"ranks": 2, "expert_load": [[[1, -2]]]}', "is no line of a recording"),
        ('{"ranks": Infinity, "expert_load": [[[1, 2]]]}', "OverflowError"),
        ('{"ranks": 2, "expert_load": [[1, 2]]}', "(1, 2)"),
        ('{"ranks": 2, "expert_load": [[[1, 2]]]}\n{"ranks": 1, "expert_load": [[[1, 2]]]}', "(1, 1, 2), (1, 2, 1)"),
    ],
)
def test_what_is_no_recording(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "loads.jsonl"
    file.write_text(text)
    with pytest.raises(EPError) as error:
        recorded(file)
    assert said in str(error.value) and str(file) in str(error.value) and "fix:" in str(error.value)


def test_a_missing_file_and_numbers_out_of_range(tmp_path: Path) -> None:
    from megatron_ep_v2.cli.what_if import what_if

    with pytest.raises(EPError, match="cannot read"):
        what_if([str(tmp_path / "none.jsonl")])
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(EPError, match=r"cannot read .*binary\n.*codec can't decode"):
        what_if([str(tmp_path / "binary")])
    for wrong in (["--slots", "0"], ["--min-rows", "0"], ["--from-percent", "99"], ["--share", "1.5"]):
        with pytest.raises(SettingsError, match="out of range"):
            what_if([str(tmp_path / "none.jsonl"), *wrong])
