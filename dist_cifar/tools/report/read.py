"""Reads run directories for the report, and derives how far a run has come.

Contract: nothing is written. A file that a run has not written yet is empty or None; so is one that is not what a run
writes, and `Run.notes` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dist_cifar.config import Config
from dist_cifar.errors import DataError, counted
from dist_cifar.run import predictions
from dist_cifar.run.predictions import Predictions, wilson_interval
from dist_cifar.run.run_dir import RunDir

_Part = TypeVar("_Part")

LOST = "terminated without a final status (killed, or its node died)"
"""The end of a job that left no event of its end."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory holds."""

    path: Path
    name: str
    config: Config
    status: dict[str, Any]
    summary: dict[str, Any]
    """Empty before the end."""
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    predictions: Predictions | None
    profile: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """What was left out of it because it could not be read, one line each."""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` that have this `kind`."""
        return [row for row in self.rows if row["kind"] == kind]

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """The `started` events, one for each job of the run."""
        return [event for event in self.events if event["event"] == "started"]

    @property
    def state(self) -> str:
        """The status of the run and, before its end, its step."""
        status = self.status.get("status", "not started")
        if status == "failed":
            return f"failed: {self.status.get('reason', 'for an unknown reason')}"
        if status == "done" or not self.starts:
            return str(status)
        total_steps = self.starts[-1]["total_steps"]
        if status == "lost":
            return f"{LOST} at step {self.last_step:,} of {total_steps:,}"
        return f"{status}, step {self.last_step:,} of {total_steps:,}"

    @property
    def last_step(self) -> int:
        """The largest step of which there is a row."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def share_done(self) -> float | None:
        """The share of the steps that are done; None unless the run is training."""
        if self.status.get("status") != "running" or not self.starts:
            return None
        return min(1.0, self.last_step / self.starts[-1]["total_steps"])

    @property
    def seconds_left(self) -> float | None:
        """Seconds of training left at the latest speed, without evaluations; None unless the run is training."""
        trained = self.of_kind("train")
        if self.status.get("status") != "running" or not self.starts or not trained:
            return None
        last = trained[-1]
        if not last["step"] or not last["images_per_second"]:
            return None
        samples_per_step = last["samples"] / last["step"]
        return (self.starts[-1]["total_steps"] - last["step"]) * samples_per_step / last["images_per_second"]

    @property
    def watched(self) -> str:
        """The split that is evaluated during the training, e.g. `validation`."""
        return next((str(row["split"]) for row in self.of_kind("eval")), "validation")

    @property
    def accuracy_interval(self) -> str:
        """The 95% interval of the test accuracy, of a run that is done."""
        confusion = np.array(self.summary["test_confusion"])
        low, high = wilson_interval(int(np.trace(confusion)), int(confusion.sum()))
        return f"{low:.2%} to {high:.2%}"


def read_run(path: Path) -> Run:
    """Reads a run directory. What is not what a run writes is left out, and `notes` says so.

    Raises `ConfigError` or `DataError` if the config is missing or cannot be read.
    """
    run_dir = RunDir(path)
    notes: list[str] = []

    def part(read: Callable[[], _Part], otherwise: _Part) -> _Part:
        try:
            return read()
        except DataError as error:
            notes.append(str(error))
            return otherwise

    config = run_dir.config()
    status = part(run_dir.status, dict[str, Any]())
    if part(run_dir.is_lost, False):
        status["status"] = "lost"
    nothing: tuple[list[dict[str, Any]], int] = ([], 0)
    (rows, strange_rows), (events, strange_events) = part(run_dir.metrics, nothing), part(run_dir.events, nothing)
    for name, count in (("metrics.jsonl", strange_rows), ("events.jsonl", strange_events)):
        if count:
            notes.append(f"{path / name}: {counted(count, 'line')} not as this version writes them, left out")
    return Run(
        path=path,
        name=config.run.name,
        config=config,
        status=status,
        summary=part(run_dir.summary, dict[str, Any]()),
        rows=rows,
        events=events,
        predictions=part(lambda: predictions.read(path), None),
        profile=part(run_dir.profile_summary, dict[str, Any]()),
        notes=list(dict.fromkeys(notes)),
    )
