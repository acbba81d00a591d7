"""The learning rate of each step.

Contract: a schedule is a function of the config, the step and the history of the metric that it observes. It touches
no optimizer and asks no other rank: ranks that observe the same metrics get the same learning rates. Steps are counted
from 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dist_cifar.config import OptimizerConfig, PlateauConfig
from dist_cifar.state import Evaluation

_SMALLEST_REDUCTION = 1e-8
"""A smaller change of the learning rate is not made (`eps` of torch's ReduceLROnPlateau)."""


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
        return (
            f"plateau: no better {self._config.metric} for {self._config.patience_evaluations + 1} evaluations;"
            f" lr {self._state.lr:.6g}"
        )

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = Plateau(**state)

    def describe(self) -> str:
        return (
            f"{self._reason}; warm-up {self._warmup_epochs:g} epochs; plateau on {self._config.metric},"
            f" patience {self._config.patience_evaluations}"
        )


def scaled_lr(optimizer: OptimizerConfig, global_size: int) -> tuple[float, str]:
    """The full learning rate for a global batch, and a line that says where it comes from.

    Square root for Adam: Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms", 2022.
    Linear: Goyal et al., "Accurate, large minibatch SGD", 2017.
    """
    ratio = global_size / optimizer.lr_base_batch
    factor = {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[optimizer.lr_rule]
    lr = optimizer.lr * factor
    rule = {
        "sqrt": f"sqrt({global_size}/{optimizer.lr_base_batch})",
        "linear": f"{global_size}/{optimizer.lr_base_batch}",
        "none": "1",
    }[optimizer.lr_rule]
    return lr, f"lr {lr:.6g} = {optimizer.lr:g} x {rule} (rule {optimizer.lr_rule}, global batch {global_size})"


def warmup_factor(warmup_steps: int, step: int) -> float:
    """The warm-up factor: linear from 1/n in step 0 to 1 in step n - 1, of n warm-up steps, and 1 afterwards."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """The state of ReduceLROnPlateau between two evaluations. All of it is saved and restored."""

    lr: float
    """Learning rate after the reductions so far, before the warm-up factor."""
    best: float
    """Best value of the watched metric so far."""
    bad_evaluations: int = 0
    """Evaluations in a row without improvement."""
    cooldown_left: int = 0
    """Evaluations that are still not counted after the last reduction."""
    reductions: int = 0
    """Number of reductions so far."""


def start_plateau(config: PlateauConfig, lr: float) -> Plateau:
    """The state before the first evaluation."""
    return Plateau(lr=lr, best=math.inf if config.metric == "loss" else -math.inf)


def step_plateau(config: PlateauConfig, state: Plateau, metric: float) -> Plateau:
    """The state after one more evaluation; the rule is torch's, with a relative threshold. NaN never improves."""
    if config.metric == "loss":
        improved = metric < state.best * (1.0 - config.threshold)
    else:
        improved = metric > state.best * (1.0 + config.threshold)
    bad = 0 if improved else state.bad_evaluations + 1
    cooldown = state.cooldown_left
    if cooldown > 0:
        cooldown, bad = cooldown - 1, 0
    lr, reductions = state.lr, state.reductions
    if bad > config.patience_evaluations:
        reduced = max(lr * config.factor, config.min_lr)
        if lr - reduced > _SMALLEST_REDUCTION:
            lr, reductions = reduced, reductions + 1
        cooldown, bad = config.cooldown_evaluations, 0
    return replace(
        state,
        lr=lr,
        best=metric if improved else state.best,
        bad_evaluations=bad,
        cooldown_left=cooldown,
        reductions=reductions,
    )


LR_SCHEDULES: dict[str, Callable[..., LRSchedule]] = {"plateau": WarmupPlateau}
"""The class of every schedule by its name."""


def build_lr_schedule(
    optimizer: OptimizerConfig, plateau: PlateauConfig, *, global_size: int, steps_per_epoch: int
) -> LRSchedule:
    """The schedule of a run whose global batch has `global_size` samples."""
    return LR_SCHEDULES["plateau"](optimizer, plateau, global_size=global_size, steps_per_epoch=steps_per_epoch)
