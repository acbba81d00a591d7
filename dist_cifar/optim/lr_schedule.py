"""The learning rate of each step.

Contract: a schedule is a function of the config, the step and the history of the metric that it observes. It touches
no optimizer and asks no other rank: ranks that observe the same metrics get the same learning rates. Steps are counted
from 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from dist_cifar.config import OptimizerConfig, PlateauConfig
from dist_cifar.errors import counted
from dist_cifar.optim.lr_scaling import scaled_lr
from dist_cifar.optim.plateau import Plateau, start_plateau, step_plateau
from dist_cifar.state import Evaluation


class LRSchedule(Protocol):
    """A learning rate that may depend on the evaluations so far."""

    def lr(self, step: int) -> float:
        """The learning rate of `step`."""
        ...

    def observe(self, evaluation: Evaluation) -> str | None:
        """Takes the result of an evaluation that is due; returns a line that says what it changed, if it did."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as JSON can hold it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        ...

    def describe(self) -> str:
        """A line that says what it does."""
        ...


class WarmupPlateau:
    """Linear warm-up, times a learning rate that is reduced when the metric has stopped improving."""

    def __init__(
        self, optimizer: OptimizerConfig, plateau: PlateauConfig, *, global_size: int, steps_per_epoch: int
    ) -> None:
        self._config = plateau
        self._warmup_steps = round(optimizer.warmup_epochs * steps_per_epoch)
        lr, self._reason = scaled_lr(optimizer, global_size)
        self._warmup_epochs = optimizer.warmup_epochs
        self._state = start_plateau(plateau, lr)

    def lr(self, step: int) -> float:
        return self._state.lr * warmup_factor(self._warmup_steps, step)

    def observe(self, evaluation: Evaluation) -> str | None:
        metric = evaluation.loss if self._config.metric == "loss" else evaluation.accuracy
        reductions = self._state.reductions
        self._state = step_plateau(self._config, self._state, metric)
        if self._state.reductions == reductions:
            return None
        waited = counted(self._config.patience_evaluations + 1, "evaluation")
        return f"plateau: no better {self._config.metric} for {waited}; lr {self._state.lr:.6g}"

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = Plateau(**state)

    def describe(self) -> str:
        return (
            f"{self._reason}; warm-up {counted(self._warmup_epochs, 'epoch')}; plateau on {self._config.metric},"
            f" patience {self._config.patience_evaluations}"
        )


def warmup_factor(warmup_steps: int, step: int) -> float:
    """The warm-up factor: linear from 1/n in step 0 to 1 in step n - 1, of n warm-up steps, and 1 afterwards."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
