"""Opens the trackers of a run: `metrics.jsonl` always, W&B, Accelerate's and the user's own where they are wanted.

Contract: JSONL errors are errors of the run (`OSError`); those of the others never are. `wandb` and `accelerate` are
imported only where they are going to be used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dist_cifar.config import Config
from dist_cifar.tracking.accelerate_trackers import AccelerateTracker, accelerate_names, require_installed
from dist_cifar.tracking.base import Tracker
from dist_cifar.tracking.counted import open_each, rows_file
from dist_cifar.tracking.exactly_once import ExactlyOnce, NumberedTracker
from dist_cifar.tracking.jsonl import JsonlTracker
from dist_cifar.tracking.own_tracker import OwnTracker
from dist_cifar.tracking.wandb_tracker import forget_wandb, open_wandb


def open_trackers(
    config: Config,
    run_dir: Path,
    *,
    resume_step: int | None,
    config_changed: bool = False,
    is_copy: bool = False,
    git_revision: Callable[[], str | None] = lambda: None,
) -> list[Tracker]:
    """The trackers of a run, in the order in which they are to be called. Call it on rank 0 only.

    `run_dir` exists. `resume_step` is the step of the checkpoint from which the run resumes, `None` at a fresh start.
    `config_changed` says that the directory holds what another config began, none of which is of this run.
    `is_copy` says that another directory holds the run that was begun here.
    `git_revision` names the source, and is called if W&B is used.
    Raises `ConfigError` if W&B or another tracker is asked for and not installed.
    """
    if config_changed or is_copy:
        forget_wandb(run_dir)
        for name in config.tracking.also:
            rows_file(run_dir, name).unlink(missing_ok=True)
    # First: their ConfigErrors must not leave a truncated metrics.jsonl.
    require_installed(config)
    wandb = open_wandb(config, run_dir, git_revision)
    jsonl = JsonlTracker(run_dir / "metrics.jsonl", resume_step)
    accelerates = accelerate_names(config)
    own = [name for name in config.tracking.also if name not in accelerates]
    others: list[NumberedTracker] = [
        *([] if wandb is None else [wandb]),
        *open_each(accelerates, lambda name: AccelerateTracker(name, config, run_dir)),
        *open_each(own, lambda name: OwnTracker(name, config, run_dir)),
    ]
    return [jsonl, *(ExactlyOnce(tracker, jsonl.kept) for tracker in others)]
