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
import torch

_QUANTUM = 2.0**-24
"""Losses are rounded to multiples of it, of which float64 adds up 2**53 without rounding: a sum of 500 million nats."""


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


class TrainingSums:
    """The `StepTotals` of this rank since the last log, kept on the device."""

    def __init__(self, device: torch.device, *, may_skip: bool) -> None:
        """With `may_skip`, what is not finite is left out and such steps are counted; else it shows in the totals."""
        self._may_skip = may_skip
        self._sums = torch.zeros(len(StepTotals._fields), dtype=torch.float64, device=device)

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds one micro-batch: its mean loss [], logits [n, classes], labels int64 [n]. No host sync."""
        count = len(labels)
        loss_sum = (loss.detach().double() * (count / _QUANTUM)).round() * _QUANTUM
        correct = (logits.argmax(1) == labels).sum().double()
        row = torch.stack((loss_sum, correct, torch.full_like(loss_sum, count)))
        if self._may_skip:
            row = torch.where(loss_sum.isfinite(), row, 0.0)
        self._sums[:3] += row

    def add_step(self, grad_norm: torch.Tensor) -> None:
        """Adds the gradient norm [] of a step; on one rank only, since it is the same on every one. No host sync."""
        norm = grad_norm.double()
        one = torch.ones_like(norm)
        row = torch.stack((norm, one, 0 * one))
        if self._may_skip:
            row = torch.where(norm.isfinite(), row, torch.stack((0 * one, 0 * one, one)))
        self._sums[3:] += row

    def totals(self) -> StepTotals:
        """What was added up. Waits for the device."""
        return StepTotals(*self._sums.tolist())

    def take(self) -> StepTotals:
        """As `totals`, and starts again."""
        totals = self.totals()
        self.reset()
        return totals

    def reset(self, totals: StepTotals = NO_STEPS) -> None:
        """Starts again, from `totals`."""
        self._sums.zero_()
        if any(totals):
            self._sums.copy_(torch.tensor(totals, dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result on a whole split."""

    loss: float
    """Mean cross entropy in nats."""
    confusion: npt.NDArray[np.int64]
    """[classes, classes]: samples of the true class (row) that were predicted as (column)."""
    logits: npt.NDArray[np.float32]
    """[count, classes], in the order of the split."""

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
