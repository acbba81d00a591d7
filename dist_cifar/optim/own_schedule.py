"""A learning rate that is a function of the step, written outside the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dist_cifar import plugins
from dist_cifar.errors import ConfigError
from dist_cifar.state import Evaluation


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


def build_own(name: str, options: Mapping[str, Any], context: ScheduleContext, reason: str) -> Any:
    """The schedule that `schedule.name` names: the component is called with `context` and the options.

    It returns the learning rate as a function of the step, or an `LRSchedule`. Raises `ConfigError` if it does neither.
    """
    component, origin = plugins.find("schedule", "schedule.name", name), f"schedule.name={name}"
    try:
        made = component(context, **options)
    except Exception as error:
        raise plugins.broken(origin, error, "making the schedule") from None
    if all(hasattr(made, method) for method in ("lr", "observe", "state_dict", "load_state_dict", "describe")):
        return made
    if not callable(made):
        raise ConfigError(f"{origin}: returns {type(made).__name__}; it must return a function of the step")
    schedule = FunctionSchedule(made, name, reason)
    schedule.lr(0)
    return schedule
