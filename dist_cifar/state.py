"""What a training run knows of itself: how far it is, what the last steps gave, what an evaluation found.

Contract: metrics are named totals and counts that are reduced once and divided once. Sums are exact, so they are the
same for every way of splitting the samples and every order of adding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


@dataclass(kw_only=True)
class TrainState:
    """How far a run is. With the schedule, the sums and the tensors it is all that a checkpoint holds."""

    step: int = 0
    """Optimizer steps since the start of the run."""
    best_accuracy: float | None = None
    """Best accuracy on the validation split at an evaluation so far."""
    best_step: int | None = None
    skipped_steps: int = 0
    """Steps that changed nothing because a gradient was not finite, up to the last log."""
    inexact_since_step: int | None = None
    """The first step after a resume that could not keep the bits of an uninterrupted run."""
    train_seconds: float = 0.0
    """Time in steps, the wait for data included; evaluation and checkpoints excluded."""
    wait_seconds: float = 0.0
    """Time in which rank 0 waited for data."""
    wall_seconds: float = 0.0
    """Time since the first start; the time between a stop and a restart is not counted."""

    def copy(self) -> TrainState:
        """The state as it is now."""
        return dataclasses.replace(self)


class StepTotals(NamedTuple):
    """Totals over some steps. The last three are counted on rank 0 alone: they are the same on every rank."""

    loss_sum: float = 0.0
    """Nats, summed over samples."""
    correct: float = 0.0
    """Samples that were classified correctly."""
    samples: float = 0.0
    norm_sum: float = 0.0
    """Gradient norms before clipping, summed over steps."""
    steps: float = 0.0
    skipped: float = 0.0
    """Steps whose gradient was not finite."""

    @classmethod
    def sum(cls, totals: Iterable[StepTotals]) -> StepTotals:
        """The totals of all ranks as one."""
        return cls(*(sum(column) for column in zip(*totals, strict=True)))

    @property
    def is_finite(self) -> bool:
        """Whether every loss and every gradient norm was finite."""
        return math.isfinite(self.loss_sum + self.norm_sum)


NO_STEPS = StepTotals()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result on a whole split."""

    loss: float
    """Mean cross entropy in nats."""
    confusion: npt.NDArray[np.int64]
    """[classes, classes]: samples of the true class (row) that were predicted as (column)."""
    logits: npt.NDArray[np.float32]
    """[count, classes], in the order of the split."""
    tta: Evaluation | None = None
    """The result with test-time augmentation, where the config asks for it."""

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Number of samples that were predicted right."""
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        """Share of the samples that were predicted right."""
        return self.correct / self.count

    @property
    def class_accuracy(self) -> list[float | None]:
        """Share of each class's samples that were predicted right; None for a class without samples."""
        totals = self.confusion.sum(axis=1)
        return [
            int(right) / int(total) if total else None
            for right, total in zip(np.diag(self.confusion), totals, strict=True)
        ]
