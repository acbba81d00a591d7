"""The closed schedules against their formulas, torch's schedulers, and through the config."""

from __future__ import annotations

import math

import pytest
import torch

from dist_cifar.config import Config, OptimizerConfig, ScheduleConfig, load_config
from dist_cifar.errors import ConfigError
from dist_cifar.optim.lr_schedule import LRSchedule
from dist_cifar.optim.schedules import build_lr_schedule

LR, EPOCH, TOTAL = 0.4, 10, 50


def build(warmup_epochs: float = 0.0, **fields: object) -> LRSchedule:
    optimizer = OptimizerConfig(name="sgd", lr=LR, lr_base_batch=32, warmup_epochs=warmup_epochs)
    config = Config(optimizer=optimizer, schedule=ScheduleConfig(**fields))
    return build_lr_schedule(config, 32, EPOCH, TOTAL)


def lrs(schedule: LRSchedule) -> list[float]:
    return [schedule.lr(step) for step in range(TOTAL)]


def torch_lrs(make: object) -> list[float]:
    """What a scheduler of torch makes of the full learning rate, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, found = make(optimizer), []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_is_torchs():
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR
    expected = torch_lrs(lambda optimizer: schedule(optimizer, T_max=TOTAL, eta_min=0.1 * LR))
    assert lrs(build(name="cosine", end=0.1)) == pytest.approx(expected, rel=1e-9)


def test_multistep_is_torchs():
    schedule = torch.optim.lr_scheduler.MultiStepLR
    expected = torch_lrs(lambda optimizer: schedule(optimizer, milestones=[15, 40], gamma=0.2))
    assert lrs(build(name="multistep", milestone_epochs=(1.5, 4.0), gamma=0.2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("start", "peak", "end"), [(0.2, 0.23, 0.07), (0.2, 0.2, 0.0), (1.0, 0.0, 0.0), (0.0, 0.5, 1.0)]
)
def test_triangle_is_two_straight_lines(start, peak, end):
    found = lrs(build(name="triangle", warmup_epochs=3, start=start, peak=peak, end=end))
    for step, lr in enumerate(found):
        if step < peak * TOTAL:
            expected = start + (1 - start) * step / (peak * TOTAL)
        else:
            expected = 1 - (1 - end) * (step - peak * TOTAL) / (TOTAL - peak * TOTAL)
        assert lr == pytest.approx(LR * expected, rel=1e-12)
    assert found[0] == pytest.approx(LR * (start if peak else 1.0))


def test_constant_is_the_full_rate():
    assert lrs(build(name="constant")) == [LR] * TOTAL


@pytest.mark.parametrize("name", ["constant", "cosine", "multistep"])
def test_each_warms_up(name):
    found = lrs(build(name=name, warmup_epochs=0.5, milestone_epochs=(4.0,)))
    assert found[:5] == pytest.approx([LR * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)])
    if name == "cosine":
        assert found[5] == LR and found[30] == pytest.approx(LR * (1 + math.cos(math.pi * 25 / 45)) / 2)


def test_a_warm_up_may_be_longer_than_the_run():
    assert lrs(build(name="cosine", warmup_epochs=10))[-1] == pytest.approx(LR / 2)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("constant", "warm-up 0.5 epochs; constant"),
        ("cosine", "warm-up 0.5 epochs; cosine to 0"),
        ("multistep", "warm-up 0.5 epochs; times 0.1 after epochs 50, 75"),
        ("triangle", "from 0.2 of it up to it at 0.2 of the run, then down to 0"),
    ],
)
def test_it_says_what_it_does_and_remembers_nothing(name, text):
    schedule = build(name=name, warmup_epochs=0.5)
    assert schedule.describe() == f"lr 0.4 = 0.4 x 32/32 (rule linear for sgd, global batch 32); {text}"
    assert schedule.observe(None) is None and schedule.state_dict() == {}


def test_milestones_are_the_decimal_numbers_that_were_written():
    """As floats, 1.1 epochs of 390 steps would be a little more than 429 steps."""
    multistep = ScheduleConfig(name="multistep", milestone_epochs=(1.1,))
    config = Config(optimizer=OptimizerConfig(warmup_epochs=0.0), schedule=multistep)
    schedule = build_lr_schedule(config, 128, 390, 780)
    assert schedule.lr(429) == pytest.approx(0.1 * schedule.lr(428))


def test_milestones_rise():
    with pytest.raises(ConfigError, match=r"schedule\.milestone_epochs: must rise, found \[3\.0, 1\.0\]"):
        load_config(None, ["schedule.name=multistep", "schedule.milestone_epochs=[3, 1]"])
