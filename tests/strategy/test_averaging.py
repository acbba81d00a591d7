"""Averages of the weights: their formulas in numpy, what a resume restores, and what uses them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from dist_cifar.config import AverageConfig, differences, flatten, load_config
from dist_cifar.data.batching import BatchPlan, plan_batches
from dist_cifar.errors import ConfigError
from dist_cifar.strategy import averaging
from dist_cifar.strategy.averaging import averaged

STEPS, EPOCH = 14, 4
EMA = AverageConfig(name="ema", every_steps=3, half_life_epochs=0.5, start_epoch=0.5)
LOOKAHEAD = AverageConfig(name="lookahead", every_steps=4, decay=0.8)


class Walk:
    """A strategy whose weights, running statistics and counts take steps that are drawn from a seed."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
        self._draws = torch.Generator().manual_seed(0)

    def step(self, lr):
        for tensor in self.module.state_dict().values():
            change = torch.randn(tensor.shape, generator=self._draws)
            tensor += change if tensor.is_floating_point() else 1
        return torch.zeros(())

    def model_state_dict(self):
        return self.module.state_dict()

    def optimizer_state_dict(self):
        return {"0.weight.exp_avg": torch.zeros(())}

    def load_model(self, model):
        self.module.load_state_dict(model)

    def load(self, model, optimizer, ranks):
        self.load_model(model)


@pytest.fixture
def plan(tiny) -> BatchPlan:
    config = tiny("batch.global_size=20", "train.epochs=3.5")
    plan = plan_batches(config.batch, config.train, train_size=80, slices=1, rank=0, world_size=1)
    assert (plan.steps_per_epoch, plan.total_steps) == (EPOCH, STEPS)
    return plan


def as_float64(model) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy().copy() for name, tensor in model.items()}


def ema_by_hand(history):
    """`history` holds the weights after each step; the average after each of them, float64."""
    decay, average, found = 2 ** (-3 / (0.5 * EPOCH)), None, []
    for step, weights in enumerate(history, start=1):
        if step == 2:
            average = dict(weights)
        elif step > 2 and step % 3 == 0:
            average = {name: decay * average[name] + (1 - decay) * value for name, value in weights.items()}
        mixed = weights | {name: value for name, value in (average or {}).items() if "num_batches" not in name}
        found.append(mixed)
    return found


def check_ema(plan):
    walk, alone = Walk(0), Walk(0)
    strategy, history, found = averaged(walk, EMA, plan), [], []
    for _ in range(STEPS):
        strategy.step(0.1)
        alone.step(0.1)
        history.append(as_float64(alone.model_state_dict()))
        found.append(as_float64(strategy.model_state_dict()))
    for weights, expected in zip(found, ema_by_hand(history), strict=True):
        assert weights.keys() == expected.keys()
        for name in weights:
            np.testing.assert_allclose(weights[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    for name, tensor in walk.model_state_dict().items():  # the training itself is unchanged
        assert torch.equal(tensor, alone.model_state_dict()[name])


def test_ema_is_its_formula_statistics_included(plan):
    check_ema(plan)


def check_lookahead(plan):
    walk, alone = Walk(0), Walk(0)
    strategy = averaged(walk, LOOKAHEAD, plan)
    slow = as_float64(alone.model_state_dict())
    for step in range(1, STEPS + 1):
        strategy.step(0.1)
        alone.step(0.1)
        weights = as_float64(alone.model_state_dict())
        if step % 4 == 0:
            kept = 0.8**4 * (step / STEPS) ** 3
            slow = {name: kept * slow[name] + (1 - kept) * value for name, value in weights.items()}
        if step % 4 == 0 or step == STEPS:
            floating = {name: torch.from_numpy(value) for name, value in slow.items() if "num_batches" not in name}
            alone.module.load_state_dict(alone.model_state_dict() | floating)
        for name, tensor in strategy.model_state_dict().items():
            expected = alone.model_state_dict()[name]
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5, msg=f"step {step}, {name}")


def test_lookahead_is_its_formula_to_the_last_step(plan):
    check_lookahead(plan)


def test_a_run_that_is_too_short_for_lookahead_is_refused(plan):
    rare = dataclasses.replace(LOOKAHEAD, every_steps=STEPS + 1)
    with pytest.raises(ConfigError, match=r"every_steps: 15 steps are more than the run has \(14\)"):
        averaged(Walk(0), rare, plan)
    averaged(Walk(0), dataclasses.replace(LOOKAHEAD, every_steps=STEPS), plan)


def test_an_average_without_the_statistics_is_caught(plan, monkeypatch):
    copy = averaging._copy
    parameters = lambda model: {name: value for name, value in copy(model).items() if "running" not in name}  # noqa: E731
    monkeypatch.setattr(averaging, "_copy", parameters)
    for check in (check_ema, check_lookahead):
        with pytest.raises(AssertionError, match="running"):
            check(plan)


@pytest.mark.parametrize("config", [EMA, LOOKAHEAD], ids=["ema", "lookahead"])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_resume_goes_on_with_the_same_bits(plan, config, stop):
    whole, first = averaged(Walk(0), config, plan), averaged(Walk(0), config, plan)
    for _ in range(STEPS):
        whole.step(0.1)
    for _ in range(stop):
        first.step(0.1)
    model, optimizer = (
        {name: tensor.clone() for name, tensor in tensors.items()}
        for tensors in (first.model_state_dict(), first.optimizer_state_dict())
    )
    walk = Walk(1)
    second = averaged(walk, config, plan)
    second.load(model, optimizer, {})
    walk._draws = first._inner._draws
    for _ in range(STEPS - stop):
        second.step(0.1)
    for found, expected in (
        (second.model_state_dict(), whole.model_state_dict()),
        (second.optimizer_state_dict(), whole.optimizer_state_dict()),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_none_is_the_strategy_itself(plan):
    walk = Walk(0)
    assert averaged(walk, AverageConfig(), plan) is walk


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_strategies_that_shard_the_weights_are_refused(strategy):
    with pytest.raises(
        ConfigError, match=rf"average\.name: ema needs whole weights .* strategy\.name={strategy} shards"
    ):
        load_config(None, ["average.name=ema", f"strategy.name={strategy}"])


def test_with_lookahead_the_length_of_the_run_decides_its_result():
    short, long = (load_config(None, ["average.name=lookahead", f"train.epochs={n}"]) for n in (3, 4))
    assert list(differences(flatten(short), long)) == ["train.epochs"]
    ema = dataclasses.replace(long, average=AverageConfig(name="ema"))
    before = dataclasses.replace(short, average=AverageConfig(name="ema"))
    assert differences(flatten(before), ema) == {}
