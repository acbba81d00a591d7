"""Metrics as counts and sums that are reduced once and divided once.

Contract: integers are exact for every way of splitting the samples; sums of losses are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


class TrainingSums:
    """Loss, correct predictions, samples and gradient norms of this rank since the last log, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        """In this order. Whole numbers are exact in float64 up to 2**53."""

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds one micro-batch: its mean loss [], logits [n, classes], labels int64 [n]. No host sync."""
        correct = (logits.argmax(1) == labels).sum()
        count = len(labels)
        self.sums[:3] += torch.stack((loss.detach().double() * count, correct.double(), torch.full_like(loss, count)))

    def add_norm(self, grad_norm: torch.Tensor) -> None:
        """Adds the gradient norm [] of a step; on one rank only, since it is the same on every one. No host sync."""
        self.sums[3] += grad_norm


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result on a whole split."""

    loss: float
    """Mean cross entropy in nats."""
    confusion: npt.NDArray[np.int64]
    """[classes, classes]: samples of the true class (row) that were predicted as (column)."""

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of the samples that were predicted right."""
        return int(np.trace(self.confusion)) / self.count

    @property
    def class_accuracy(self) -> list[float | None]:
        """Share of each class's samples that were predicted right; None for a class without samples."""
        totals = self.confusion.sum(axis=1)
        return [
            int(right) / int(total) if total else None
            for right, total in zip(np.diag(self.confusion), totals, strict=True)
        ]
