"""A tracker from outside the package, named in `tracking.also`.

Contract: the class is called with the config and the run directory, on rank 0. Nothing depends on it: what it raises is
logged once, and the run continues without it. How many rows it was given is in `<name>.rows` in the run directory, a
byte for each: a resumed run does not give them again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_cifar import plugins
from dist_cifar.config import Config
from dist_cifar.errors import one_line
from dist_cifar.tracking.base import Results

logger = logging.getLogger(__name__)


class OwnTracker:
    """See `dist_cifar.tracking.exactly_once.NumberedTracker`."""

    def __init__(self, name: str, config: Config, run_dir: Path) -> None:
        path = rows_file(run_dir, name)
        self.row_count = path.stat().st_size if path.exists() else 0
        self._name = name
        self._failed = False
        self._tracker = plugins.find("tracker", "tracking.also", name)(config, run_dir)
        self._given = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the life of the run

    def log(self, row: Mapping[str, Any], number: int) -> None:
        """Gives the row to the tracker."""
        self._attempt(lambda: self._tracker.log(row))
        self._given.write(b".")

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        """Gives the results to the tracker and closes it."""
        self._attempt(lambda: self._tracker.finish(exit_code, results))
        self._given.close()

    def _attempt(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            if not self._failed:
                logger.info(f"{plugins.broken(f'tracking.also={self._name}', error, 'it')}; its rows may be missing")
            self._failed = True


def open_own_trackers(names: list[str], config: Config, run_dir: Path) -> list[OwnTracker]:
    """The trackers of `names` that can be opened."""
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(OwnTracker(name, config, run_dir))
        except Exception as error:  # whatever it is, the run does not depend on it
            logger.info(f"{name}: {one_line(error)}; continuing without it")
    return found


def rows_file(run_dir: Path, name: str) -> Path:
    """The file whose length is the number of rows that a tracker was given."""
    return run_dir / f"{name.replace(':', '-')}.rows"
