"""The trackers that Accelerate knows, behind the `Tracker` interface: `tracking.also`.

Contract: nothing depends on them, as on W&B (`dist_cifar.tracking.counted`). The only error is `ConfigError`: asked for
and not installed. Each gets the flattened config, and the numbers of every row under the names that W&B gets, at the
row's step.

A tracker that takes a directory writes to `<name>/` in the run directory, the others where their own settings say
(`MLFLOW_TRACKING_URI`, `TRACKIO_DIR`). The run's name is what they call a project or an experiment. Most of them take
every start for a run of its own.

Accelerate's trackers ask its `PartialState` which process this is. Where no strategy has made one, there is one during
each call, of a process by itself: only rank 0 opens trackers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_cifar.config import Config
from dist_cifar.config.schema import TRACKERS
from dist_cifar.errors import ConfigError
from dist_cifar.tracking.accelerate_private import any_state
from dist_cifar.tracking.base import Results
from dist_cifar.tracking.counted import CountedTracker
from dist_cifar.tracking.exactly_once import named, public_config


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


class AccelerateTracker(CountedTracker):
    """One of Accelerate's trackers. See `dist_cifar.tracking.exactly_once.NumberedTracker`."""

    def __init__(self, name: str, config: Config, run_dir: Path) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        self._tracker = kind(config.run.name, *([str(run_dir / name)] if kind.requires_logging_directory else []))
        with any_state():
            self._tracker.start()
        super().__init__(name, run_dir)
        self._attempt(lambda: self._tracker.store_init_configuration(_flat(public_config(config))))

    def _log(self, row: Mapping[str, Any]) -> None:
        """The numbers of the row, at the row's step."""
        values = {name: value for name, value in named(row).items() if isinstance(value, int | float)}
        self._tracker.log(values, step=row["step"])

    def _finish(self, exit_code: int, results: Results | None) -> None:
        """The results are not rows."""
        self._tracker.finish()

    def _attempt(self, call: Callable[[], Any]) -> None:
        def in_any_state() -> None:
            with any_state():
                call()

        super()._attempt(in_any_state)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with lists as text, which every tracker takes, and without null, which some do not take."""
    texts = {key: str(value) if isinstance(value, list) else value for key, value in config.items()}
    return {key: value for key, value in texts.items() if value is not None}
