"""A tracker of the user's own: each row once, and none of its errors ends a run."""

from __future__ import annotations

from typing import ClassVar

import pytest

from dist_cifar import plugins
from dist_cifar.config import Config, TrackingConfig
from dist_cifar.tracking.registry import open_trackers

ROW = {"kind": "train", "step": 1, "loss": 1.0}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {})
    all_opened = []

    def opened(component, resume_step=None, **more):
        plugins.register_tracker("own")(component)
        config = Config(tracking=TrackingConfig(wandb="disabled", also=("own",)))
        trackers = open_trackers(config, tmp_path, resume_step=resume_step, **more)
        all_opened.append(trackers)
        return trackers

    yield opened
    for trackers in all_opened:
        for tracker in trackers:
            tracker.finish(0)


class Keeps:
    rows: ClassVar[list] = []
    ends: ClassVar[list] = []

    def __init__(self, config, run_dir):
        assert isinstance(config, Config) and run_dir.is_dir()

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code, results=None):
        self.ends.append((exit_code, results))


class Fails(Keeps):
    def log(self, row):
        raise ConnectionError("no net")


def test_each_row_is_given_once_also_after_a_resume(opened, monkeypatch):
    monkeypatch.setattr(Keeps, "rows", [])
    monkeypatch.setattr(Keeps, "ends", [])
    rows = [ROW | {"step": step} for step in range(1, 4)]
    trackers = opened(Keeps)
    for row in rows[:2]:
        for tracker in trackers:
            tracker.log(row)
    trackers = opened(Keeps, resume_step=1)  # the second row comes again
    for row in rows[1:]:
        for tracker in trackers:
            tracker.log(row)
    for tracker in trackers:
        tracker.finish(0)
    assert [row["step"] for row in Keeps.rows] == [1, 2, 3] and Keeps.ends == [(0, None)]
    trackers.clear()


def test_its_errors_are_one_line_and_the_run_goes_on(opened, said):
    trackers = opened(Fails)
    for step in (1, 2):
        for tracker in trackers:
            tracker.log(ROW | {"step": step})
    (line,) = said
    assert "tracking.also=own: it fails: " in line and "ConnectionError: no net" in line


def test_one_that_cannot_be_opened_is_left_out(opened, said):
    assert len(opened(lambda config, run_dir: 1 / 0)) == 1
    assert said == ["own: division by zero; continuing without it"]


def test_what_another_config_began_is_begun_anew(opened, tmp_path):
    (tmp_path / "own.rows").write_text("...")
    opened(Keeps, config_changed=True)
    assert (tmp_path / "own.rows").read_text() == ""
