"""A tracker from outside the package, named in `tracking.also`.

Contract: the class is called with the config and the run directory, on rank 0. See `dist_cifar.tracking.counted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_cifar import plugins
from dist_cifar.config import Config
from dist_cifar.tracking.base import Results
from dist_cifar.tracking.counted import CountedTracker


class OwnTracker(CountedTracker):
    """The user's own tracker, behind `dist_cifar.tracking.exactly_once.NumberedTracker`."""

    def __init__(self, name: str, config: Config, run_dir: Path) -> None:
        self._tracker = plugins.find("tracker", "tracking.also", name)(config, run_dir)
        super().__init__(name, run_dir)

    def _log(self, row: Mapping[str, Any]) -> None:
        self._tracker.log(row)

    def _finish(self, exit_code: int, results: Results | None) -> None:
        self._tracker.finish(exit_code, results)

    def _complaint(self, error: Exception) -> str:
        return f"{plugins.broken(f'tracking.also={self._name}', error, 'it')}; its rows may be missing"
