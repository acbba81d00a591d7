"""What a rank adds up while it trains, on its device.

Contract: sums are exact, so they are the same for every way of splitting the samples and every order of adding.
"""

from __future__ import annotations

import torch

from dist_cifar.state import NO_STEPS, StepTotals

_QUANTUM = 2.0**-24
"""Losses are rounded to multiples of it, of which float64 adds up 2**53 without rounding: a sum of 500 million nats."""
_AT_ONCE = 64
"""Passes that are added up together."""


class TrainingSums:
    """The `StepTotals` of this rank since the last log, kept on the device."""

    def __init__(self, device: torch.device, *, may_skip: bool) -> None:
        """With `may_skip`, what is not finite is left out and such steps are counted; else it shows in the totals."""
        self._may_skip = may_skip
        self._sums = torch.zeros(len(StepTotals._fields), dtype=torch.float64, device=device)
        self._passes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """Loss, logits and labels of the passes that are not in the sums yet."""

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds one micro-batch: its mean loss [], logits [n, classes], labels int64 [n]. No host sync.

        Of labels that are shares of the classes, float32 [n, classes], the largest counts.
        """
        self._passes.append((loss.detach(), logits.detach(), labels))
        if len(self._passes) == _AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        """Adds up the passes that wait, all of one size at once: a GPU's host starts each operation by itself."""
        for count in {len(labels): None for _, _, labels in self._passes}:
            losses, logits, labels = zip(*(one for one in self._passes if len(one[2]) == count), strict=True)
            loss_sums = (torch.stack(losses).double() * (count / _QUANTUM)).round() * _QUANTUM
            truth = torch.cat(labels) if labels[0].dim() == 1 else torch.cat(labels).argmax(1)
            correct = (torch.cat(logits).argmax(1) == truth).view(-1, count).sum(1).double()
            rows = torch.stack((loss_sums, correct, torch.full_like(loss_sums, count)))
            if self._may_skip:
                rows = torch.where(loss_sums.isfinite(), rows, 0.0)
            self._sums[:3] += rows.sum(1)
        self._passes.clear()

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
        self._flush()
        return StepTotals(*self._sums.tolist())

    def take(self) -> StepTotals:
        """As `totals`, and starts again."""
        totals = self.totals()
        self.reset()
        return totals

    def reset(self, totals: StepTotals = NO_STEPS) -> None:
        """Starts again, from `totals`."""
        self._passes.clear()
        self._sums.zero_()
        if any(totals):
            self._sums.copy_(torch.tensor(totals, dtype=torch.float64))
