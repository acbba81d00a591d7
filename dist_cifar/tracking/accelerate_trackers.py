"""The trackers that Accelerate knows, behind the `Tracker` interface: `tracking.also`.

Contract: nothing depends on them, as on W&B: what one of them raises is logged once, and the run continues without it.
The only error is `ConfigError`: asked for and not installed. Each gets the flattened config, and the numbers of every
row under the names that W&B gets, at the row's step.

A tracker that takes a directory writes to `<name>/` in the run directory, the others where their own settings say
(`MLFLOW_TRACKING_URI`, `TRACKIO_DIR`). The run's name is what they call a project or an experiment. Most of them take
every start for a run of its own. How many rows each was given is in `<name>.rows` in the run directory, a byte for each
row, written after it: a resumed run does not give them again.

Accelerate's trackers ask its `PartialState` which process this is. Where no strategy has made one, there is one during
each call, of a process by itself: only rank 0 opens trackers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_cifar.config import Config
from dist_cifar.config.schema import TRACKERS
from dist_cifar.errors import ConfigError, one_line
from dist_cifar.tracking.accelerate_private import any_state
from dist_cifar.tracking.base import Results
from dist_cifar.tracking.exactly_once import named, public_config
from dist_cifar.tracking.own_tracker import rows_file

logger = logging.getLogger(__name__)


def accelerate_names(config: Config) -> list[str]:
    """The names of `tracking.also` that are Accelerate's."""
    return [name for name in config.tracking.also if name in TRACKERS]


def require_installed(config: Config) -> None:
    """Raises `ConfigError` for a tracker of `tracking.also` whose package is missing."""
    if accelerate_names(config):
        from accelerate.tracking import get_available_trackers

        installed = [str(name) for name in get_available_trackers()]
        for name in accelerate_names(config):
            if name not in installed:
                raise ConfigError(f"tracking.also: {name} is not installed; pip install {name}, or leave it out")


def open_accelerate_trackers(config: Config, run_dir: Path) -> list[AccelerateTracker]:
    """The trackers of `tracking.also` that can be opened."""
    found = []
    for name in dict.fromkeys(accelerate_names(config)):
        try:
            found.append(AccelerateTracker(name, config, run_dir))
        except Exception as error:  # whatever it is, the run does not depend on it
            logger.info(f"{name}: {one_line(error)}; continuing without it")
    return found


class AccelerateTracker:
    """One of Accelerate's trackers. See `dist_cifar.tracking.exactly_once.NumberedTracker`."""

    def __init__(self, name: str, config: Config, run_dir: Path) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        path = rows_file(run_dir, name)
        self.row_count = path.stat().st_size if path.exists() else 0
        self._name = name
        self._failed = False
        self._tracker = kind(config.run.name, *([str(run_dir / name)] if kind.requires_logging_directory else []))
        with any_state():
            self._tracker.start()
        self._attempt(lambda: self._tracker.store_init_configuration(_flat(public_config(config))))
        self._given = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the life of the run

    def log(self, row: Mapping[str, Any], number: int) -> None:
        """Gives the numbers of the row to the tracker, at the row's step."""
        values = {name: value for name, value in named(row).items() if isinstance(value, int | float)}
        self._attempt(lambda: self._tracker.log(values, step=row["step"]))
        self._given.write(b".")

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        """Closes the tracker; the results are not rows."""
        self._attempt(self._tracker.finish)
        self._given.close()

    def _attempt(self, call: Callable[[], Any]) -> None:
        try:
            with any_state():
                call()
        except Exception as error:
            if not self._failed:
                logger.info(f"{self._name}: {one_line(error)}; some of the metrics will be missing there")
            self._failed = True


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with lists as text, which every tracker takes, and without null, which some do not take."""
    texts = {key: str(value) if isinstance(value, list) else value for key, value in config.items()}
    return {key: value for key, value in texts.items() if value is not None}
