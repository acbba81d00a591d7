"""Learning rate schedules from outside the package."""

from __future__ import annotations

import math

import pytest

from dist_cifar import plugins
from dist_cifar.config import Config, OptimizerConfig, ScheduleConfig, known_names
from dist_cifar.errors import ConfigError
from dist_cifar.optim.schedules import LR_SCHEDULES, build_lr_schedule

OPTIMIZER = OptimizerConfig(lr=0.4, lr_rule="linear", lr_base_batch=64, warmup_epochs=0.5)


def build(name: str, **options: object):
    config = Config(optimizer=OPTIMIZER, schedule=ScheduleConfig(name=name, options=options))
    return build_lr_schedule(config, 32, 10, 25)


def test_every_name_of_the_config_is_a_schedule():
    assert set(LR_SCHEDULES) == set(known_names("schedule", "name"))


def test_a_function_of_the_step_is_a_schedule():
    schedule = build("examples.own_schedule:cosine", floor=0.1)
    full = 0.4 * 32 / 64
    assert schedule.lr(0) == pytest.approx(full / 5) and schedule.lr(4) == pytest.approx(full)
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2
    assert schedule.lr(15) == pytest.approx(full * middle) and schedule.lr(25) == pytest.approx(full * 0.1)
    assert schedule.observe(None) is None and schedule.state_dict() == {}
    assert "examples.own_schedule:cosine" in schedule.describe()


class Halves:
    def __init__(self, context, patience: int = 1):
        self.rate = context.lr

    def lr(self, step):
        return self.rate

    def observe(self, evaluation):
        self.rate /= 2
        return "halved"

    def state_dict(self):
        return {"rate": self.rate}

    def load_state_dict(self, state):
        self.rate = state["rate"]

    def describe(self):
        return "halves"


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {})
    return lambda component: plugins.register_schedule("own")(component)


def test_a_schedule_that_observes_is_used_as_it_is(registered):
    registered(Halves)
    schedule = build("own", patience=2)
    assert isinstance(schedule, Halves) and schedule.observe(None) == "halved" and schedule.lr(3) == 0.1


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (lambda context: 3, "returns int; it must return a function of the step"),
        (lambda context: lambda step: float("nan"), "the learning rate of step 0 is nan"),
        (lambda context: lambda step: -1.0, "the learning rate of step 0 is -1.0"),
        (lambda context: lambda step: [][step], "the learning rate of step 0 fails: .*IndexError"),
        (lambda context: 1 / 0, "making the schedule fails: .*ZeroDivisionError"),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(registered, component, message):
    registered(component)
    with pytest.raises(ConfigError, match=f"schedule.name=own: {message}"):
        build("own")
