"""ReduceLROnPlateau as a pure function of its state and a metric.

Contract: ranks that give it the same metrics get the same states. The rule is that of torch's scheduler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dist_cifar.config import PlateauConfig

_SMALLEST_REDUCTION = 1e-8
"""A smaller change of the learning rate is not made (`eps` of torch's ReduceLROnPlateau)."""


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
