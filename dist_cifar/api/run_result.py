"""What `train` and `launch` return.

Contract: nothing here imports torch, so that a program which only launches does not need to wait for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_cifar.config import Config
from dist_cifar.errors import StoppedError, counted
from dist_cifar.run.run_dir import RunDir


@dataclass(frozen=True, kw_only=True, repr=False)
class RunResult:
    """A run that is done, or that was stopped and saved."""

    status: Literal["done", "saved"]
    """`saved`: a signal or the end of its time has stopped it; the same call resumes it."""
    summary: dict[str, Any]
    """What `summary.json` in the run directory holds: `test_accuracy`, `weights_sha256` and more; empty if the run is
    not done."""
    run_dir: Path
    """The run directory, which `load_model` takes."""
    metrics: list[dict[str, Any]]
    """The rows of `metrics.jsonl`, each with `kind` (`train`, `eval` or `test`), `step` and what was measured."""

    def __repr__(self) -> str:
        shown: list[str] = [self.status]
        if self.summary:
            shown.append(f"test accuracy {self.summary['test_accuracy']:.2%}")
        steps = max((row["step"] for row in self.metrics), default=0)
        return f"<RunResult: {', '.join([*shown, counted(steps, 'step'), str(self.run_dir)])}>"


def read_result(config: Config, *, is_done: bool) -> RunResult:
    """The result of a run that has just ended. Raises `DataError` if its files cannot be read."""
    run_dir = RunDir.of(config)
    return RunResult(
        status="done" if is_done else "saved",
        summary=run_dir.summary() if is_done else {},
        run_dir=run_dir.path,
        metrics=run_dir.metrics()[0],
    )


def result_of_stop(config: Config, signal_name: str) -> RunResult:
    """The result of a run that a signal has stopped before it took a step, or in its final test.

    Raises `KeyboardInterrupt` for SIGINT and else `StoppedError` if nothing is saved.
    """
    run_dir = RunDir.of(config)
    if run_dir.status().get("status") == "saved":
        return read_result(config, is_done=False)
    if signal_name == "SIGINT":
        raise KeyboardInterrupt
    raise StoppedError(f"stopped by {signal_name} before there was anything to save")
