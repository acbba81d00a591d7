"""The learning rate schedules by name.

A new one is a builder that is entered in `LR_SCHEDULES`, and a function in `closed_schedules.py` or a class as in
`lr_schedule.py`; one from outside the package is named in the config: a function of the step, or an `LRSchedule`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dist_cifar import plugins
from dist_cifar.config import Config, as_written
from dist_cifar.errors import ConfigError, counted
from dist_cifar.optim import closed_schedules
from dist_cifar.optim.lr_scaling import scaled_lr
from dist_cifar.optim.lr_schedule import LRSchedule, WarmupPlateau, warmup_factor
from dist_cifar.state import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleContext:
    """What a schedule can be a function of, beside the step."""

    lr: float
    """The full learning rate, after the rule that follows the batch size."""
    reason: str
    """A line that says where it comes from."""
    global_size: int
    """Samples of one step."""
    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    """Steps of `optimizer.warmup_epochs`."""


class FunctionSchedule:
    """An `LRSchedule` that is a closed function of the step and observes nothing."""

    def __init__(self, function: Callable[[int], float], name: str, description: str) -> None:
        """`name` is that of the config; `description` is a line that says what the schedule does."""
        self._function, self._name, self._description = function, name, description

    def lr(self, step: int) -> float:
        origin = f"schedule.name={self._name}"
        try:
            lr = float(self._function(step))
        except Exception as error:
            raise plugins.broken(origin, error, f"the learning rate of step {step}") from None
        if not 0 <= lr < 1e6:
            raise ConfigError(f"{origin}: the learning rate of step {step} is {lr}; it must be finite and not negative")
        return lr

    def observe(self, evaluation: Evaluation) -> str | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def describe(self) -> str:
        return self._description


def _plateau(config: Config, context: ScheduleContext) -> LRSchedule:
    return WarmupPlateau(
        config.optimizer,
        config.plateau,
        global_size=context.global_size,
        steps_per_epoch=context.steps_per_epoch,
    )


def _constant(config: Config, context: ScheduleContext) -> LRSchedule:
    return _warmed(config, context, lambda step: 1.0, "constant")


def _cosine(config: Config, context: ScheduleContext) -> LRSchedule:
    end, warmup, total = config.schedule.end, context.warmup_steps, context.total_steps
    return _warmed(
        config,
        context,
        lambda step: closed_schedules.cosine(step, warmup_steps=warmup, total_steps=total, end=end),
        f"cosine to {end:g}",
    )


def _multistep(config: Config, context: ScheduleContext) -> LRSchedule:
    gamma, epochs = config.schedule.gamma, config.schedule.milestone_epochs
    milestones = [float(as_written(epoch) * context.steps_per_epoch) for epoch in epochs]
    return _warmed(
        config,
        context,
        lambda step: closed_schedules.multistep(step, milestone_steps=milestones, gamma=gamma),
        f"times {gamma:g} after epochs {', '.join(f'{epoch:g}' for epoch in epochs)}",
    )


def _triangle(config: Config, context: ScheduleContext) -> LRSchedule:
    start, peak, end, total = config.schedule.start, config.schedule.peak, config.schedule.end, context.total_steps
    return FunctionSchedule(
        lambda step: context.lr * closed_schedules.triangle(step, total_steps=total, start=start, peak=peak, end=end),
        config.schedule.name,
        f"{context.reason}; from {start:g} of it up to it at {peak:g} of the run, then down to {end:g}",
    )


def _warmed(config: Config, context: ScheduleContext, share: Callable[[int], float], shown: str) -> LRSchedule:
    """The full learning rate times the warm-up's factor and the `share` of a step."""
    return FunctionSchedule(
        lambda step: context.lr * warmup_factor(context.warmup_steps, step) * share(step),
        config.schedule.name,
        f"{context.reason}; warm-up {counted(config.optimizer.warmup_epochs, 'epoch')}; {shown}",
    )


LR_SCHEDULES: dict[str, Callable[[Config, ScheduleContext], LRSchedule]] = {
    "plateau": _plateau,
    "constant": _constant,
    "cosine": _cosine,
    "triangle": _triangle,
    "multistep": _multistep,
}
"""The builder of every schedule by its name."""


def build_lr_schedule(config: Config, global_size: int, steps_per_epoch: int, total_steps: int) -> LRSchedule:
    """The schedule of a run of `total_steps` whose global batch has `global_size` samples."""
    lr, reason = scaled_lr(config.optimizer, global_size)
    context = ScheduleContext(
        lr=lr,
        reason=reason,
        global_size=global_size,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=round(config.optimizer.warmup_epochs * steps_per_epoch),
    )
    name = config.schedule.name
    if name in LR_SCHEDULES:
        return LR_SCHEDULES[name](config, context)
    return _build_own(name, config.schedule.options, context)


def _build_own(name: str, options: Mapping[str, Any], context: ScheduleContext) -> LRSchedule:
    """The schedule that `schedule.name` names: the component is called with `context` and the options.

    It returns the learning rate as a function of the step, or an `LRSchedule`. Raises `ConfigError` if it does neither.
    """
    component, origin = plugins.find("schedule", "schedule.name", name), f"schedule.name={name}"
    try:
        made = component(context, **options)
    except Exception as error:
        raise plugins.broken(origin, error, "making the schedule") from None
    if all(hasattr(made, method) for method in ("lr", "observe", "state_dict", "load_state_dict", "describe")):
        own: LRSchedule = made
        return own
    if not callable(made):
        raise ConfigError(f"{origin}: returns {type(made).__name__}; it must return a function of the step")
    schedule = FunctionSchedule(made, name, f"{context.reason}; {name}")
    schedule.lr(0)
    return schedule
