"""Scaling, warm-up and the plateau, against torch's scheduler."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_cifar.config import Config, OptimizerConfig, PlateauConfig
from dist_cifar.optim.lr_scaling import scaled_lr
from dist_cifar.optim.lr_schedule import LRSchedule, warmup_factor
from dist_cifar.optim.plateau import start_plateau, step_plateau
from dist_cifar.optim.schedules import build_lr_schedule
from dist_cifar.state import Evaluation


def torch_lrs(config: PlateauConfig, lr: float, metrics: list[float]) -> list[float]:
    """The learning rate after each evaluation, by torch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="min" if config.metric == "loss" else "max",
        factor=config.factor,
        patience=config.patience_evaluations,
        threshold=config.threshold,
        cooldown=config.cooldown_evaluations,
        min_lr=config.min_lr,
    )
    lrs = []
    for metric in metrics:
        scheduler.step(metric)
        lrs.append(optimizer.param_groups[0]["lr"])
    return lrs


@given(
    metrics=st.lists(st.floats(0, 4) | st.just(math.nan) | st.sampled_from([1.0, 1.0001, 0.9999]), max_size=40),
    metric=st.sampled_from(["loss", "accuracy"]),
    factor=st.sampled_from([0.1, 0.5, 0.9]),
    patience=st.integers(0, 4),
    cooldown=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 1e-4, 0.1]),
    min_lr=st.sampled_from([0.0, 1e-3]),
)
def test_plateau_equals_torch(metrics, metric, factor, patience, cooldown, threshold, min_lr):
    config = PlateauConfig(
        metric=metric,
        factor=factor,
        patience_evaluations=patience,
        cooldown_evaluations=cooldown,
        threshold=threshold,
        min_lr=min_lr,
    )
    state, lrs = start_plateau(config, 0.1), []
    for value in metrics:
        state = step_plateau(config, state, value)
        lrs.append(state.lr)
    assert lrs == torch_lrs(config, 0.1, metrics)


def test_plateau_that_never_improves_reduces_after_its_patience():
    config = PlateauConfig(patience_evaluations=2, factor=0.1)
    state, reductions = start_plateau(config, 1.0), []
    for _ in range(8):
        state = step_plateau(config, state, 5.0)
        reductions.append(state.reductions)
    assert reductions == [0, 0, 0, 1, 1, 1, 2, 2]  # the first value is an improvement on none


@pytest.mark.parametrize(("rule", "lr"), [("sqrt", 0.02), ("linear", 0.04), ("none", 0.01)])
def test_lr_rule(rule, lr):
    value, reason = scaled_lr(OptimizerConfig(lr=0.01, lr_rule=rule, lr_base_batch=128), 512)
    assert value == pytest.approx(lr)
    assert rule in reason and "512" in reason


@pytest.mark.parametrize(
    ("name", "lr", "shown"),
    [
        ("adam", 0.02, "sqrt for adam"),
        ("adamw", 0.02, "sqrt for adamw"),
        ("sgd", 0.04, "linear for sgd"),
        ("muon", 0.04, "linear for muon"),
        ("torch.optim:SGD", 0.02, "sqrt for torch.optim:SGD"),
    ],
)
def test_the_rule_follows_the_optimizer_and_says_so(name, lr, shown):
    value, reason = scaled_lr(OptimizerConfig(name=name, lr=0.01), 512)
    assert value == pytest.approx(lr) and f"(rule {shown}, global batch 512)" in reason


def test_warmup_reaches_the_full_rate_and_stays():
    assert [warmup_factor(5, step) for step in range(7)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]
    assert warmup_factor(0, 0) == 1.0


def evaluation(loss: float, correct: int = 5) -> Evaluation:
    """The result on ten samples of two classes."""
    confusion = np.array([[correct, 10 - correct], [0, 0]])
    return Evaluation(loss=loss, confusion=confusion, logits=np.zeros((10, 2), np.float32))


def schedule(plateau: PlateauConfig) -> LRSchedule:
    optimizer = OptimizerConfig(lr=0.1, lr_rule="none", warmup_epochs=0.5)
    config = Config(optimizer=optimizer, plateau=plateau)
    return build_lr_schedule(config, 10, 10, 100)


def test_a_schedule_is_its_warm_up_times_its_plateau():
    plateau = PlateauConfig(patience_evaluations=0, factor=0.5)
    ours = schedule(plateau)
    assert [ours.lr(step) for step in (0, 3, 4, 20)] == pytest.approx([0.02, 0.08, 0.1, 0.1])
    assert ours.observe(evaluation(1.0)) is None
    line = ours.observe(evaluation(1.5))
    assert line == "plateau: no better loss for 1 evaluation; lr 0.05"
    assert [ours.lr(step) for step in (0, 20)] == pytest.approx([0.01, 0.05])
    assert "warm-up 0.5 epochs" in ours.describe() and "plateau on loss" in ours.describe()


def test_a_schedule_watches_the_metric_of_its_config():
    ours = schedule(PlateauConfig(metric="accuracy", patience_evaluations=0))
    ours.observe(evaluation(1.0, correct=5))
    assert ours.observe(evaluation(9.0, correct=6)) is None
    assert "accuracy" in str(ours.observe(evaluation(0.1, correct=6)))


def test_a_schedule_continues_from_what_json_kept_of_it():
    plateau = PlateauConfig(patience_evaluations=1, cooldown_evaluations=1)
    losses = [3.0, 2.0, 2.5, 2.5, 2.5, 2.5, 1.0, 1.5, 1.5, 1.5]
    whole, before = schedule(plateau), schedule(plateau)
    for loss in losses:
        whole.observe(evaluation(loss))
    for loss in losses[:4]:
        before.observe(evaluation(loss))
    after = schedule(plateau)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.lr(9) == before.lr(9) == 0.05
    for loss in losses[4:]:
        after.observe(evaluation(loss))
    assert after.state_dict() == whole.state_dict() and after.lr(9) == whole.lr(9) < 0.05
