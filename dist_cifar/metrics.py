"""Metrics as counts and sums that are reduced once and divided once.

Contract: sums are exact, so they are the same for every way of splitting the samples and every order of adding.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_QUANTUM = 2.0**-24
"""Losses are rounded to multiples of it, of which float64 adds up 2**53 without rounding: a sum of 500 million nats."""


class TrainingSums:
    """What this rank has seen since the last log, kept on the device."""

    def __init__(self, device: torch.device, *, may_skip: bool) -> None:
        """With `may_skip`, what is not finite is left out and such steps are counted; else it shows in the sums."""
        self._may_skip = may_skip
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)
        """Loss, correct predictions, samples; and, on one rank, gradient norms, steps, skipped steps."""

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds one micro-batch: its mean loss [], logits [n, classes], labels int64 [n]. No host sync."""
        count = len(labels)
        loss_sum = (loss.detach().double() * (count / _QUANTUM)).round() * _QUANTUM
        correct = (logits.argmax(1) == labels).sum().double()
        row = torch.stack((loss_sum, correct, torch.full_like(loss_sum, count)))
        if self._may_skip:
            row = torch.where(loss_sum.isfinite(), row, 0.0)
        self.sums[:3] += row

    def add_step(self, grad_norm: torch.Tensor) -> None:
        """Adds the gradient norm [] of a step; on one rank only, since it is the same on every one. No host sync."""
        norm = grad_norm.double()
        one = torch.ones_like(norm)
        row = torch.stack((norm, one, 0 * one))
        if self._may_skip:
            row = torch.where(norm.isfinite(), row, torch.stack((0 * one, 0 * one, one)))
        self.sums[3:] += row


class OwnTime:
    """Time of this rank's own work, up to the point of a step where ranks begin to wait for each other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = self._started = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """A step begins."""
        if self._device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            self._events.append(events)
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """The step has come to where it may wait."""
        if self._device.type == "cuda":
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds since the last call. On a GPU the steps since then must be done."""
        seconds = self._seconds + sum(start.elapsed_time(stop) for start, stop in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has had so far: of its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


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
