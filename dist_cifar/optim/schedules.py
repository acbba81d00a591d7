"""The learning rate schedules by name.

A new one is a file beside `lr_schedule.py`, with a builder that is entered in `LR_SCHEDULES`; one from outside the
package is named in the config: a function of the step, or an `LRSchedule`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dist_cifar import plugins
from dist_cifar.config import Config
from dist_cifar.errors import ConfigError
from dist_cifar.optim.lr_scaling import scaled_lr
from dist_cifar.optim.lr_schedule import LRSchedule, WarmupPlateau
from dist_cifar.state import Evaluation


def build_plateau(config: Config, *, global_size: int, steps_per_epoch: int) -> LRSchedule:
    """The schedule `plateau`."""
    return WarmupPlateau(config.optimizer, config.plateau, global_size=global_size, steps_per_epoch=steps_per_epoch)


LR_SCHEDULES: dict[str, Callable[..., LRSchedule]] = {"plateau": build_plateau}
"""The builder of every schedule by its name."""


def build_lr_schedule(config: Config, global_size: int, steps_per_epoch: int, total_steps: int) -> LRSchedule:
    """The schedule of a run of `total_steps` whose global batch has `global_size` samples."""
    name = config.schedule.name
    if name in LR_SCHEDULES:
        return LR_SCHEDULES[name](config, global_size=global_size, steps_per_epoch=steps_per_epoch)
    lr, reason = scaled_lr(config.optimizer, global_size)
    context = ScheduleContext(
        lr=lr,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=round(config.optimizer.warmup_epochs * steps_per_epoch),
    )
    return _build_own(name, config.schedule.options, context, reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleContext:
    """What a schedule can be a function of, beside the step."""

    lr: float
    """The full learning rate, after the rule that follows the batch size."""
    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    """Steps of `optimizer.warmup_epochs`."""


class FunctionSchedule:
    """An `LRSchedule` that is a closed function of the step and observes nothing."""

    def __init__(self, function: Callable[[int], float], name: str, reason: str) -> None:
        """`reason` says where the full learning rate comes from."""
        self._function, self._name, self._reason = function, name, reason

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
        return f"{self._reason}; {self._name}"


def _build_own(name: str, options: Mapping[str, Any], context: ScheduleContext, reason: str) -> LRSchedule:
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
    schedule = FunctionSchedule(made, name, reason)
    schedule.lr(0)
    return schedule
