"""The files of a run may hold anything: readers answer in one line, or go on without that part and say so."""

from __future__ import annotations

import json
import os
import random
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from dist_cifar.config import load_config
from dist_cifar.errors import DataError, UserError
from dist_cifar.run import predictions, run_files
from dist_cifar.run.predictions import Predictions
from dist_cifar.run.run_dir import RunDir
from dist_cifar.tools import watch
from dist_cifar.tools.report import read_run, render
from dist_cifar.tracking.jsonl import JsonlTracker

FILES = ["status.json", "metrics.jsonl", "events.jsonl", "summary.json", "config.yaml", "profile/summary.json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory as a training leaves it, without a training."""
    path = tmp_path_factory.mktemp("runs") / "run"
    run_dir = RunDir(path)
    run_dir.open()
    run_dir.write_config(load_config(None, [f"run.dir={path}", "data.source=synthetic", "data.validation_size=40"]))
    start = {"total_steps": 4, "steps_per_epoch": 2, "world_size": 2, "host": "h", "device": "cpu", "strategy": "exact"}
    run_dir.append_event("started", step=0, **start)
    run_dir.append_event("checkpoint", step=2, best=True)
    run_dir.append_event("lr_reduction", step=2, lr=0.01)
    run_dir.append_event("saved", step=2)
    run_dir.append_event("started", step=2, **start)
    tracker = JsonlTracker(path / "metrics.jsonl", None)
    for step in range(1, 5):
        row = {"step": step, "epoch": step / 2, "samples": 16 * step, "loss": float("nan") if step == 1 else 1 / step}
        row |= {"accuracy": 0.1 * step, "seconds": 2.0 * step}
        more = {"lr": 0.1, "grad_norm": None, "images_per_second": 9.5, "data_wait_share": 0.1}
        tracker.log({"kind": "train", **row, **more, "rank_work_share": [0.5, 0.25]})
        tracker.log({"kind": "eval", **row, "split": "validation"})
    tracker.log({"kind": "test", **row})
    tracker.finish(0)
    summary = {
        "name": "run",
        "test_accuracy": 0.5,
        "test_loss": 0.7,
        "test_class_accuracy": {"a": 0.5, "b": None},
        "test_confusion": [[1, 1], [0, 0]],
        "best_val_accuracy": 0.5,
        "best_step": 2,
        "best_chosen_on": "validation",
        "steps": 4,
        "epochs": 2.0,
        "wall_seconds": 3.5,
        "images_per_second": 10.0,
        "data_wait_share": 0.1,
        "world_size": 2,
        "weights_sha256": "0" * 64,
        "versions": {"torch": "2"},
        "numerics": {"threads": 1},
    }
    run_dir.write_summary(summary)
    phase = {"milliseconds": 1.0, "share": 0.5, "slowest_rank": 0, "slowest_milliseconds": 2.0}
    times = {"milliseconds_per_step": 2.0, "milliseconds_per_step_min": 1.0, "milliseconds_per_step_max": 3.0}
    facts = {"strategy": "exact", "world_size": 2, "device": "cpu", "timed_steps": 2}
    run_dir.write_profile({**facts, **times, "phases": {"forward": phase, "backward": phase}})
    pixels = np.zeros((1, 2, 32, 32, 3), np.uint8)
    found = Predictions(
        labels=np.array([0, 0]),
        probabilities=np.array([[0.75, 0.25], [0.25, 0.75]], np.float32),
        classes=("a", "b"),
        worst_indices=np.array([1]),
        worst_images=pixels[0, :1],
        augmented=pixels,
    )
    predictions.write(path, found)
    run_dir.write_status("done", step=4, world_size=2)
    return path


def look(path: Path) -> list[str]:
    """What every reader of a run directory does; returns what they say."""
    try:
        found = read_run(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return [str(error)]
    assert "<script>" in render([found, found]) and watch.screen(found, 60)
    assert all("\n" not in note for note in found.notes)
    watch.version([path])
    RunDir(path).previous_config()
    return found.notes


def copy(run: Path, folder: Path) -> Path:
    shutil.rmtree(folder / "run", ignore_errors=True)
    return Path(shutil.copytree(run, folder / "run"))


def test_a_whole_run_has_no_notes(run):
    assert look(run) == []


DAMAGES = {
    "empty": lambda data: b"",
    "null": lambda data: b"null\n",
    "list": lambda data: b"[]\n",
    "list of lists": lambda data: b"[[[[1]]]]\n" * 3,
    "deep": lambda data: b"[" * 100_000,
    "number": lambda data: b"1e999\n",
    "zeros": lambda data: bytes(len(data)),
    "half": lambda data: data[: len(data) // 2],
    "tail": lambda data: data + b"\0" * 512,
    "latin": lambda data: b"\xff\xfe" + data,
    "empty object": lambda data: b"{}\n",
}


@pytest.mark.parametrize("name", [*FILES[:4], FILES[5], predictions.NAME])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_said_or_does_no_harm(run, tmp_path, name, damage):
    path = copy(run, tmp_path)
    (path / name).write_bytes(DAMAGES[damage]((path / name).read_bytes()))
    said = look(path)
    keeps = {("metrics.jsonl", "half"), ("events.jsonl", "half"), ("metrics.jsonl", "empty"), ("events.jsonl", "empty")}
    assert said or (name, damage) in keeps or name == predictions.NAME


@pytest.mark.parametrize("name", [*FILES, predictions.NAME])
def test_what_is_no_regular_file_is_not_read(run, tmp_path, name):
    for make in (os.mkdir, os.mkfifo):
        path = copy(run, tmp_path)
        (path / name).unlink()
        make(path / name)
        assert any("not a regular file" in line for line in look(path)), make
    path = copy(run, tmp_path)
    (path / name).unlink()
    (path / name).symlink_to(path / name)  # a loop
    assert any("cannot be read" in line for line in look(path))


VALUES = [None, True, -1, 0, 1, 2**53, 10**400, 1e308, -1e308, 1e-320, float("nan"), float("-inf"), "nan", "", "x"]
VALUES += ["<script>alert(1)</script>", "\x1b[2J", "\ud800", [], [1], ["nan"], [[]], {}, {"a": None}, {"": {"": 1}}]


def test_any_value_at_any_place_does_no_harm(run, tmp_path):
    """A fuzzer: some values of all files are replaced, taken away or put elsewhere."""
    chance = random.Random(16)
    path = copy(run, tmp_path)
    for _ in range(200):
        for name in chance.sample([name for name in FILES if name != "config.yaml"], 2):
            lines = (run / name).read_text().splitlines() if name.endswith("l") else [(run / name).read_text()]
            records = [json.loads(line) for line in lines]
            for _ in range(chance.randint(1, 3)):
                _change(chance.choice(records), chance)
            (path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        page = look(path)
        assert not any("\x1b" in line for line in page)


def _change(record: dict, chance: random.Random) -> None:
    """Changes one value, at any depth."""
    key = chance.choice(list(record))
    inside = record[key]
    if isinstance(inside, dict) and inside and chance.random() < 0.6:
        _change(inside, chance)
    elif chance.random() < 0.2:
        del record[key]
        record.setdefault("step", 0)
    elif isinstance(inside, list) and inside and chance.random() < 0.6:
        inside[chance.randrange(len(inside))] = deepcopy(chance.choice(VALUES))
    else:
        record[key] = deepcopy(chance.choice(VALUES))


def test_predictions_that_do_not_fit_each_other_are_left_out(run, tmp_path):
    path = copy(run, tmp_path)
    arrays = dict(np.load(path / predictions.NAME))
    for name, value in {
        "labels": np.array([0, 2]),
        "probabilities": np.array([[np.nan, 0.25], [0.25, 0.75]], np.float32),
        "worst_indices": np.array([2]),
        "worst_images": np.zeros((1, 8, 8, 3), np.uint8),
        "augmented": np.zeros((0, 2, 32, 32, 3), np.uint8),
        "classes": np.array([1, 2]),
    }.items():
        np.savez(path / predictions.NAME, **arrays | {name: value})
        assert any(predictions.NAME in line for line in look(path)), name
    np.savez(path / predictions.NAME, allow_pickle=True, **arrays | {"classes": np.array([None, {}], dtype=object)})
    assert any("not what this version writes" in line for line in look(path))


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "status.json").write_text(json.dumps({"status": "done"}))
    monkeypatch.setattr(run_files, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="more than a run writes"):
        RunDir(tmp_path).status()


def test_rows_have_their_numbers_back(tmp_path):
    row = {"kind": "train", "step": 1, "loss": float("inf"), "shares": [float("-inf"), 0.5]}
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", None)
    tracker.log(row)
    tracker.finish(0)
    again = JsonlTracker(tmp_path / "metrics.jsonl", 1)
    assert again.kept == [row]
    again.finish(0)
