"""The run directory: what a run writes, and what says whether and how it goes on.

Contract: `config.yaml` is the resolved config of the latest start, `status.json` says `running`, `saved`, `done` or
`failed` and is always whole, `metrics.jsonl` and `summary.json` hold the results, `checkpoints/` all that a resume
needs. Only rank 0 writes, but for a rank that fails and says so in `status.json`.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_cifar import config as configuration
from dist_cifar.config import Config
from dist_cifar.errors import DataError
from dist_cifar.files import write_atomic


class RunDir:
    """Paths and small files of one run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self._config, self._status, self._summary = (
            self.path / name for name in ("config.yaml", "status.json", "summary.json")
        )

    def open(self) -> None:
        """Creates the directory. Raises `DataError` if it cannot be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / ".writable", "")
            (self.path / ".writable").unlink()
        except OSError as error:
            raise DataError(
                f"run.dir={self.path}: cannot be written ({error.strerror}); give another with run.dir=PATH"
            ) from None

    def write_config(self, config: Config) -> None:
        """Saves the resolved config."""
        write_atomic(self._config, configuration.to_yaml(config))

    def write_status(self, status: str, **details: Any) -> None:
        """Says how the run stands."""
        facts = {"status": status, **details, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        write_atomic(self._status, json.dumps(facts, indent=2) + "\n")

    def write_failure(self, rank: int, reason: str) -> None:
        """Says that a rank failed. The first one to say so is kept: the others fail because of it."""
        if self.status().get("status") == "running":
            self.write_status("failed", rank=rank, reason=reason)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Saves the result of the run."""
        write_atomic(self._summary, json.dumps(summary, indent=2) + "\n")

    def append_digests(self, row: Mapping[str, Any]) -> None:
        """Adds one line to `digests.jsonl`."""
        with open(self.path / "digests.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def status(self) -> dict[str, Any]:
        """What `status.json` says; empty if there is none."""
        return json.loads(self._status.read_text()) if self._status.exists() else {}

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says; empty if there is none."""
        return json.loads(self._summary.read_text()) if self._summary.exists() else {}
