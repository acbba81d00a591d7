"""A learning rate schedule of one's own: a warm-up and half a cosine.

    dist-cifar train --config configs/quickstart.yaml schedule.name=examples.own_schedule:cosine

The function gets what there is to know (`dist_cifar.optim.schedules.ScheduleContext`) and the options, and returns the
learning rate as a function of the step. A schedule that looks at the evaluations is a class: `dist_cifar.LRSchedule`.

Source: Loshchilov and Hutter, "SGDR", ICLR 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_cifar.optim.schedules import ScheduleContext


def cosine(context: ScheduleContext, floor: float = 0.0) -> Callable[[int], float]:
    """From the full learning rate to `floor` times it."""

    def lr(step: int) -> float:
        if step < context.warmup_steps:
            return context.lr * (step + 1) / context.warmup_steps
        done = (step - context.warmup_steps) / max(1, context.total_steps - context.warmup_steps)
        return context.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)

    return lr
