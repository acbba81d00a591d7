"""The protocol of trackers: what rows of metrics are given to.

Contract: trackers live on rank 0 alone. A row is a mapping of plain Python values with `kind` (`train`, `eval`, ...),
`step` (optimizer steps since the start of the run) and whatever was measured; kind and step together name a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dist_cifar.config import Config
from dist_cifar.run.predictions import Predictions


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a run that is done."""

    summary: Mapping[str, Any]
    predictions: Predictions | None = None
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    """Directories of the checkpoints to upload, by `best` and `last`; empty unless they are wanted."""


class Tracker(Protocol):
    """Takes the rows of a run."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Takes one row; returns at once."""

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        """Takes the results of the run, if it is done, and closes; called once, nothing is logged after it."""


OpenTracker = Callable[[Config, Path], Tracker]
"""Opens a tracker that the caller of a training brings, given the config and the run directory."""
