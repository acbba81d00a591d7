"""Reads run directories for the report, and derives how far a run has come.

Contract: nothing is written. A file that a run has not written yet is empty or None; a damaged one is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_cifar.config import Config
from dist_cifar.run import predictions
from dist_cifar.run.predictions import Predictions, wilson_interval
from dist_cifar.run.run_dir import RunDir

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

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` that have this `kind`."""
        return [row for row in self.rows if row["kind"] == kind]

    @property
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
        samples_per_step = last["samples"] / last["step"]
        return (self.starts[-1]["total_steps"] - last["step"]) * samples_per_step / last["images_per_second"]

    @property
    def accuracy_interval(self) -> str:
        """The 95% interval of the test accuracy, of a run that is done."""
        confusion = np.array(self.summary["test_confusion"])
        low, high = wilson_interval(int(np.trace(confusion)), int(confusion.sum()))
        return f"{low:.2%} to {high:.2%}"


def read_run(path: Path) -> Run:
    """Reads a run directory. Raises `ConfigError` or `DataError` for files that are not what a run writes."""
    run_dir = RunDir(path)
    config, status = run_dir.config(), run_dir.status()
    if run_dir.is_lost():
        status["status"] = "lost"
    return Run(
        path=path,
        name=config.run.name,
        config=config,
        status=status,
        summary=run_dir.summary(),
        rows=run_dir.metrics(),
        events=run_dir.events(),
        predictions=predictions.read(path),
        profile=run_dir.profile_summary(),
    )
