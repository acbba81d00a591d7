"""What `state.json` of a checkpoint holds, checked: a checkpoint may be whole and yet of another version.

Contract: what `require_state` lets through has every part that a resume and an inference read, each of its type.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dist_cifar.errors import CheckpointError
from dist_cifar.run.checkpoint import Checkpoint
from dist_cifar.run.run_files import (
    Shape,
    by_name,
    each,
    is_amount,
    is_count,
    is_finite,
    is_positive,
    is_text,
    misfit,
    optional,
)
from dist_cifar.state import NO_STEPS, TrainState


def _is_anything(value: Any) -> bool:
    return True


_TRAIN_STATE: Shape = {
    "step": is_count,
    "best_accuracy": optional(is_finite),
    "best_step": optional(is_count),
    "skipped_steps": is_count,
    "inexact_since_step": optional(is_count),
    "train_seconds": is_amount,
    "wait_seconds": is_amount,
    "wall_seconds": is_amount,
}


def _is_train_state(value: Any) -> bool:
    names = {field.name for field in dataclasses.fields(TrainState)}
    return isinstance(value, dict) and set(value) == names and misfit(value, _TRAIN_STATE) is None


def _is_colour(value: Any) -> bool:
    return each(is_finite)(value) and len(value) == 3


_STATE: Shape = {
    "train_state": _is_train_state,
    "schedule": by_name(_is_anything),
    "sums": lambda value: each(is_finite)(value) and len(value) == len(NO_STEPS),
    "config": by_name(_is_anything),
    "data_sha256": is_text,
    "classes": lambda value: each(is_text)(value) and len(value) > 0,
    "mean": _is_colour,
    "std": lambda value: _is_colour(value) and min(value) > 0,
    "world_size": is_positive,
    "numerics": by_name(_is_anything),
    "own_files": by_name(is_text),
}
_GROUPS = ("model", "optimizer", "ranks")


def require_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The state of a checkpoint. Raises `CheckpointError` unless it is one that this version writes."""
    state = checkpoint.state
    wrong = misfit(state, _STATE) if isinstance(state, dict) else "it is no object"
    missing = [name for name in _GROUPS if name not in checkpoint.tensors]
    if wrong is None and missing:
        wrong = f"{missing[0]}.safetensors is missing"
    if wrong is not None:
        raise foreign(checkpoint, wrong)
    return state


def foreign(checkpoint: Checkpoint, wrong: str) -> CheckpointError:
    """The error for a checkpoint that is whole and not of this version."""
    return CheckpointError(
        f"{checkpoint.path}: every byte is as it was written, but not by this version of dist_cifar ({wrong}); use the"
        " version that wrote it"
    )
