"""Writes the report at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_cifar.config import Config
from dist_cifar.tools.report import page
from dist_cifar.tracking.base import Results

logger = logging.getLogger(__name__)


class ReportTracker:
    """Writes the report of a run when it is done. See `dist_cifar.tracking.base.Tracker`."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._run_dir = run_dir

    def log(self, row: Mapping[str, Any]) -> None:
        """Does nothing: the report reads `metrics.jsonl`."""

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        """Writes the report, if the run is done; a report that fails is a warning."""
        if results is None:
            return
        try:
            page.write_report([self._run_dir])
        except Exception as error:  # the run is done all the same
            logger.info(f"warning: no report ({' '.join(str(error).split())}); see dist-cifar report --help")
