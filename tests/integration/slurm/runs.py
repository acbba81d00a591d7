"""The run that every test of this folder trains, and what must be true of it afterwards.

Contract: with `arguments` and `environment` a process trains it under the recorder (`recorder/sitecustomize.py`); a
`Run` reads what it wrote. `Run.require_equal` compares weights, metrics and trained samples with an
undisturbed run on one rank: strategy `exact` gives the same bits on any number of ranks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests import REPOSITORY

RECORDER = Path(__file__).with_name("recorder")
STEPS = 40
FIELDS = ("kind", "step", "epoch", "samples", "loss", "accuracy", "lr", "grad_norm")
"""What a row says that is not a time."""
_CONFIG = {
    "run.device": "cpu",
    "run.log_every_steps": "1",
    "run.timeout_seconds": "20",
    "data.source": "synthetic",
    "data.synthetic_train_size": "120",
    "data.synthetic_test_size": "40",
    "data.validation_size": "40",
    "model.name": "resnet8",
    "batch.global_size": "16",
    "optimizer.warmup_epochs": "1",
    "plateau.patience_evaluations": "0",
    "plateau.threshold": "0.1",
    "train.epochs": "8",
    "compute.precision": "fp32",
    "checkpoint.every_steps": "3",
    "tracking.wandb": "disabled",
}


def arguments(run_dir: Path, *overrides: str) -> list[str]:
    """What `train` is given."""
    values = {"run.dir": str(run_dir), **_CONFIG, **dict(override.split("=", 1) for override in overrides)}
    return [f"{key}={value}" for key, value in values.items()]


def environment(folder: Path, seconds: str = "0", crash: str = "0 0") -> dict[str, str]:
    """The variables with which a process becomes a recorded rank of this suite."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{RECORDER}{os.pathsep}{REPOSITORY}",
        "RECORDER_FOLDER": str(folder),
        "RECORDER_SECONDS": seconds,
        "RECORDER_CRASH": crash,
    }


class Run:
    """One run and its records, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dir = folder / "run"
        folder.mkdir(parents=True, exist_ok=True)

    def log(self) -> str:
        """The job's log."""
        path = self.folder / "job.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def status(self) -> dict[str, Any]:
        path = self.dir / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def summary(self) -> dict[str, Any]:
        return json.loads((self.dir / "summary.json").read_text())

    def rows(self) -> list[dict[str, Any]]:
        """What `metrics.jsonl` says, without the times."""
        lines = (self.dir / "metrics.jsonl").read_text().splitlines()
        return [{field: row.get(field) for field in FIELDS} for row in map(json.loads, lines)]

    def ledger(self) -> list[tuple[int, int, float, list[str]]]:
        """(step, rank, time, hash of each sample) of every batch that a rank trained on, by time."""
        found = []
        for path in self.folder.glob("ledger-*.jsonl"):
            rank = int(path.stem.removeprefix("ledger-"))
            for line in path.read_text().splitlines():
                row = json.loads(line)
                found.append((row["step"], rank, row["time"], row["samples"]))
        return sorted(found, key=lambda entry: entry[2])

    def step(self) -> int:
        """The step that is being trained, counted from 0; -1 before the first."""
        return max((step for step, *_ in self.ledger()), default=-1)

    def requeues(self) -> list[str]:
        """For each requeue by the batch script, why."""
        path = self.dir / "requeues.log"
        return [line.split()[1] for line in path.read_text().splitlines()] if path.exists() else []

    def require_equal(self, golden: Run, *, once: bool = True) -> None:
        """The run has ended as `golden` did. `once`: no sample was trained on twice, as after a crash."""
        assert self.summary()["weights_sha256"] == golden.summary()["weights_sha256"]
        assert self.rows() == golden.rows()
        wanted = {step: samples for step, _, _, samples in golden.ledger()}
        assert sorted(wanted) == list(range(STEPS))
        trained: dict[int, list[str]] = {step: [] for step in wanted}
        for step, rank, _, samples in self.ledger():
            assert samples == wanted[step][rank * len(samples) :][: len(samples)], f"step {step}, rank {rank}"
            trained[step] += samples
        for step, samples in trained.items():
            assert set(samples) == set(wanted[step]), f"step {step}"
            assert not once or len(samples) == len(wanted[step]), f"step {step} was trained more than once"
