"""Gives trackers other than `metrics.jsonl` each row of a run exactly once, under the names that rows have there.

Contract: a row's number is its position in `metrics.jsonl`, from 0. A tracker behind `ExactlyOnce` gets the rows that
it does not have yet, in the order of their numbers, however often the run was killed: what it lacks of the rows up to
the checkpoint is given to it at the start of a job, and what it has of the rows beyond is not given again when the run
repeats them. A run repeats its rows under the same numbers unless the fields that set how often it logs or evaluates
were changed after a kill: then a tracker that is ahead of the checkpoint lacks a few of the new rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from dist_cifar.config import Config, flatten
from dist_cifar.tracking.base import Results

_SHARED = {"step": "global_step", "epoch": "epoch", "samples": "samples"}


class NumberedTracker(Protocol):
    """A tracker that takes each row with its number."""

    row_count: int
    """The number of rows that it has from earlier jobs of the run: those whose number is smaller."""

    def log(self, row: Mapping[str, Any], number: int) -> None:
        """Takes one row; returns at once."""

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        """Takes the results, if the run is done, and closes. See `dist_cifar.tracking.base.Tracker.finish`."""


class ExactlyOnce:
    """Numbers the rows and passes on those that a tracker lacks. See `dist_cifar.tracking.base.Tracker`.

    `rows` are those that `metrics.jsonl` holds at the start of the job.
    """

    def __init__(self, tracker: NumberedTracker, rows: Iterable[Mapping[str, Any]]) -> None:
        self._tracker = tracker
        self._next = 0
        self._kept: set[tuple[str, int]] = set()
        for row in rows:
            self.log(row)
            self._kept.add((row["kind"], row["step"]))

    def log(self, row: Mapping[str, Any]) -> None:
        """Passes the row on, unless the tracker has it."""
        if (row["kind"], row["step"]) in self._kept:  # an evaluation done again at the same step
            return
        if self._next >= self._tracker.row_count:
            self._tracker.log(row, self._next)
        self._next += 1

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        """Passes the results on."""
        self._tracker.finish(exit_code, results)


def named(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row under the names that trackers get; a list, of which they draw no curve, as a value for each item."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        label = _SHARED.get(name, f"{row['kind']}/{name}")
        if isinstance(value, list | tuple):
            found |= {f"{label}/{i}": item for i, item in enumerate(value)}
        elif name != "kind":
            found[label] = value
    return found


def public_config(config: Config) -> dict[str, Any]:
    """The flattened config as others may see it."""
    return {key: _without_secrets(value) for key, value in flatten(config).items()}


def _without_secrets(value: Any) -> Any:
    if not isinstance(value, str) or "://" not in value:
        return value
    return urlsplit(value)._replace(netloc=urlsplit(value).netloc.rpartition("@")[2], query="", fragment="").geturl()
