"""`metrics.jsonl` and the atomic write under it."""

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_cifar.run.atomic_io import write_atomic
from dist_cifar.tracking.jsonl import JsonlTracker, encode, rows_until


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(step: int, **values: float) -> dict:
    return {"kind": "train", "step": step, **values}


def test_a_row_is_in_the_file_when_log_returns(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", None)
    tracker.log(train(1, loss=0.1))
    assert rows(tmp_path / "metrics.jsonl") == [train(1, loss=0.1)]  # before finish: a kill loses nothing
    tracker.log({"kind": "eval", "step": 1, "accuracy": 0.5, "name": "Zürich"})
    tracker.finish(0)
    assert [row["kind"] for row in rows(tmp_path / "metrics.jsonl")] == ["train", "eval"]


@given(st.floats(allow_nan=False))
def test_floats_are_exact(value):
    back = float(json.loads(encode({"x": value}))["x"])
    assert back == value and math.copysign(1, back) == math.copysign(1, value)


def test_non_finite_floats_are_strings_in_valid_json():
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = encode({"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": (1.5,)})
    back = json.loads(line, parse_constant=refuse)
    assert back == {"a": "nan", "b": ["inf", {"c": "-inf"}], "d": [1.5]}
    assert math.isnan(float(back["a"]))


def test_resume_removes_what_was_written_beyond_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(path, None)
    for step in range(1, 8):
        first.log(train(step, loss=1 / step))
    first.log({"kind": "eval", "step": 5, "accuracy": 0.5})
    before = rows(path)
    first.finish(0)

    resumed = JsonlTracker(path, 5)
    assert rows(path) == [row for row in before if row["step"] <= 5]
    for step in range(6, 9):
        resumed.log(train(step, loss=1 / step))
    resumed.log({"kind": "eval", "step": 5, "accuracy": 0.5})  # done again after the resume
    resumed.finish(0)
    keys = [(row["kind"], row["step"]) for row in rows(path)]
    assert len(keys) == len(set(keys)) and set(keys) == {("train", step) for step in range(1, 9)} | {("eval", 5)}


def test_a_fresh_start_empties_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(encode(train(0)) + "\n")  # a process that died before its first checkpoint
    JsonlTracker(path, None).finish(0)
    assert path.read_text() == ""


@given(st.data())
def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path_factory, data):
    whole = [encode(train(step, loss=step / 7)) for step in range(4)]
    text = "\n".join(whole) + "\n"
    cut = data.draw(st.integers(0, len(text)))
    complete = [line for index, line in enumerate(whole) if cut >= len("\n".join(whole[: index + 1]))]
    path = tmp_path_factory.getbasetemp() / "torn.jsonl"
    path.write_text(text[:cut])
    assert [line for line, _ in rows_until(path, 10).values()] == complete


def test_resume_reads_over_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode(train(1)).encode() + b"\n" + b"\0" * 100 + b"\xff\xfe")
    tracker = JsonlTracker(path, 3)
    tracker.log(train(4))
    tracker.finish(0)
    assert rows(path) == [train(1), train(4)]


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def full(_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
