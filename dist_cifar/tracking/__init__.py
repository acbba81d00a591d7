"""Where the numbers of a run go: `metrics.jsonl` always, W&B and Accelerate's trackers where they are wanted.

Contract: every function here is called on rank 0 only; the caller sees to that. A row is a mapping of plain Python
values with `kind` (`train`, `eval`, ...), `step` (optimizer steps since the start of the run) and whatever was
measured; kind and step together name a row. JSONL errors are errors of the run (`OSError`); those of the others never
are. `wandb` and `accelerate` are imported only where they are going to be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dist_cifar.config import Config
from dist_cifar.tracking.also import forget_also, open_also, require_installed
from dist_cifar.tracking.jsonl import JsonlTracker
from dist_cifar.tracking.rows import EachOnce, NumberedTracker, Results
from dist_cifar.tracking.wandb_adapter import forget_wandb, open_wandb


class Tracker(Protocol):
    """One place that rows go to."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Takes one row; returns at once."""

    def finish(self, exit_code: int, results: Results | None = None) -> None:
        """Takes the results of the run, if it is done, and closes; called once, nothing is logged after it."""


def open_trackers(
    config: Config,
    run_dir: Path,
    *,
    resume_step: int | None,
    starts_over: bool = False,
    say: Callable[[str], None],
    git_revision: Callable[[], str | None] = lambda: None,
) -> list[Tracker]:
    """The trackers of a run, in the order in which they are to be called. Call it on rank 0 only.

    `run_dir` exists. `resume_step` is the step of the checkpoint that the run goes on from, `None` at a fresh start.
    `starts_over` says that the directory has what another config began and that none of it counts any more.
    `say` prints one line for the person who watches; `git_revision` names the source, and is asked if W&B is used.
    Raises `ConfigError` where W&B or another tracker is asked for and not installed.
    """
    if starts_over:
        forget_wandb(run_dir)
        forget_also(config, run_dir)
    # First: their ConfigErrors must not leave a truncated metrics.jsonl.
    require_installed(config)
    wandb = open_wandb(config, run_dir, say, git_revision)
    jsonl = JsonlTracker(run_dir / "metrics.jsonl", resume_step)
    others: list[NumberedTracker] = [*([] if wandb is None else [wandb]), *open_also(config, run_dir, say)]
    return [jsonl, *(EachOnce(tracker, jsonl.kept) for tracker in others)]
