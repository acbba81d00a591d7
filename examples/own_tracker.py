"""A tracker of one's own: a table of the evaluations, as a CSV file in the run directory.

    dist-cifar train --config configs/quickstart.yaml tracking.also=[examples.own_tracker:CsvTracker]

It is made on rank 0 from the config and the run directory. Each row of `metrics.jsonl` is given to it once, also when
the run is killed and resumed; what it raises is logged and does not end the run.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_cifar.config import Config
    from dist_cifar.tracking.base import Results


class CsvTracker:
    """Writes `evaluations.csv`."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._path = run_dir / "evaluations.csv"

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends the row if it is of an evaluation."""
        if row["kind"] in ("eval", "test"):
            is_new = not self._path.exists()
            with self._path.open("a", newline="") as file:
                writer = csv.writer(file)
                if is_new:
                    writer.writerow(["kind", "step", "loss", "accuracy"])
                writer.writerow([row["kind"], row["step"], row["loss"], row["accuracy"]])

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        """Has nothing to close."""
