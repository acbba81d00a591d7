"""The result of a run: `summary.json`, and the end of a run on one screen.

Contract: pure functions of what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dist_cifar.config import Config, own_files
from dist_cifar.errors import counted
from dist_cifar.run.provenance import device_name, git_revision, numerics_fingerprint, versions
from dist_cifar.run.run_dir import RunDir
from dist_cifar.state import Evaluation, TrainState


def build_summary(
    config: Config,
    state: TrainState,
    test: Evaluation,
    *,
    classes: tuple[str, ...],
    data_sha256: str,
    weights_sha256: str,
    best_chosen_on: str,
    global_size: int,
    steps_per_epoch: int,
    world_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """What `summary.json` holds. `test` is the result of the model that `eval.select` names; `global_size` is in
    samples a step."""
    return {
        "name": config.run.name,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        **_with_tta(config, test.tta),
        "test_class_accuracy": dict(zip(classes, test.class_accuracy, strict=True)),
        "test_confusion": test.confusion.tolist(),
        "best_val_accuracy": state.best_accuracy,
        "best_step": state.best_step,
        "best_chosen_on": best_chosen_on,
        "test_step": state.step if config.eval.select == "last" else state.best_step,
        "steps": state.step,
        "epochs": state.step / steps_per_epoch,
        "wall_seconds": state.wall_seconds,
        "images_per_second": state.step * global_size / state.train_seconds,
        "data_wait_share": state.wait_seconds / state.train_seconds,
        "world_size": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "device": device_name(device),
        "strategy": config.strategy.name,
        "precision": config.compute.precision,
        "weights_sha256": weights_sha256,
        "inexact_since_step": state.inexact_since_step,
        "data_sha256": data_sha256,
        "numerics": numerics_fingerprint(device),
        "versions": versions(),
        "own_files": own_files(config),
        "git_revision": git_revision(),
    }


def _with_tta(config: Config, test: Evaluation | None) -> dict[str, Any]:
    """What is added for a result with test-time augmentation."""
    if test is None:
        return {}
    views = {"tta": config.eval.tta, "tta_share": config.eval.tta_share}
    return {"test_accuracy_tta": test.accuracy, "test_loss_tta": test.loss, **views}


def result_rows(summary: Mapping[str, Any], run_dir: RunDir) -> list[tuple[str, str]]:
    """Rows (name, text) of the table that a person reads at the end of a run."""
    steps = counted(summary["steps"], "step")
    rows = [
        ("test accuracy", f"{summary['test_accuracy']:.2%} (loss {summary['test_loss']:.4f})"),
        ("model", _tested(summary)),
        (
            "trained",
            f"{counted(summary['epochs'], 'epoch')}, {steps} in {summary['wall_seconds']:,.0f} s",
        ),
        (
            "speed",
            f"{summary['images_per_second']:,.0f} images/s, world size {summary['world_size']},"
            f" data wait {summary['data_wait_share']:.1%}",
        ),
        ("weights", f"sha256 {summary['weights_sha256'][:16]}"),
        ("run directory", str(run_dir.path)),
    ]
    if summary.get("test_accuracy_tta") is not None:
        rows.insert(1, ("with TTA", f"{summary['test_accuracy_tta']:.2%} (loss {summary['test_loss_tta']:.4f})"))
    if run_dir.report.exists():
        rows.append(("report", str(run_dir.report)))
    return rows


def test_step(summary: Mapping[str, Any]) -> int:
    """The step whose weights were tested; a summary of an earlier version has those of the best step."""
    step: int = summary.get("test_step", summary["best_step"])
    return step


def _tested(summary: Mapping[str, Any]) -> str:
    """Which weights were tested, and why."""
    step, best = test_step(summary), f"the best on the {summary['best_chosen_on']} split"
    accuracy = f"({summary['best_val_accuracy']:.2%})"
    if step == summary["best_step"]:
        return f"of step {step}, {best} {accuracy}"
    return f"of step {step}, the last; {best} was step {summary['best_step']} {accuracy}"
