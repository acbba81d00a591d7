"""What trackers share that cannot tell how many rows they have, and on which nothing depends.

Contract: what such a tracker raises is logged once, and the run continues without it. How many rows it was given is in
`<name>.rows` in the run directory, a byte for each, written after it: a resumed run does not give them again.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dist_cifar.errors import one_line
from dist_cifar.tracking.base import Results

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CountedTracker(ABC):
    """See `dist_cifar.tracking.exactly_once.NumberedTracker`. A subclass says what is done with rows and results."""

    def __init__(self, name: str, run_dir: Path) -> None:
        path = rows_file(run_dir, name)
        self.row_count = path.stat().st_size if path.exists() else 0
        self._name, self._failed = name, False
        self._given = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the life of the run

    def log(self, row: Mapping[str, Any], number: int) -> None:
        """Gives the row to the tracker."""
        self._attempt(lambda: self._log(row))
        self._given.write(b".")

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        """Gives the results to the tracker and closes it."""
        self._attempt(lambda: self._finish(exit_code, results))
        self._given.close()

    @abstractmethod
    def _log(self, row: Mapping[str, Any]) -> None:
        """Hands the row on."""

    @abstractmethod
    def _finish(self, exit_code: int, results: Results | None) -> None:
        """Hands the results on and closes the tracker."""

    def _complaint(self, error: Exception) -> str:
        """The line about the first error."""
        return f"{self._name}: {one_line(error)}; some of the metrics will be missing there"

    def _attempt(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            if not self._failed:
                logger.info(self._complaint(error))
            self._failed = True


def open_each(names: Iterable[str], make: Callable[[str], T]) -> list[T]:
    """What `make` makes of each name once, but for those that cannot be opened."""
    found = []
    for name in dict.fromkeys(names):
        try:
            found.append(make(name))
        except Exception as error:  # whatever it is, the run does not depend on it
            logger.info(f"{name}: {one_line(error)}; continuing without it")
    return found


def rows_file(run_dir: Path, name: str) -> Path:
    """The file whose length is the number of rows that a tracker was given."""
    return run_dir / f"{name.replace(':', '-')}.rows"
