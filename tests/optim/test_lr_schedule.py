"""Plans, scaling, warm-up and the plateau, against torch's scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_cifar.config import BatchConfig, OptimizerConfig, PlateauConfig, TrainConfig
from dist_cifar.errors import ConfigError
from dist_cifar.optim.lr_schedule import (
    evaluation_due,
    plan_batches,
    scaled_lr,
    start_plateau,
    step_plateau,
    warmup_factor,
)


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


def test_plateau_that_never_improves_cuts_after_its_patience():
    config = PlateauConfig(patience_evaluations=2, factor=0.1)
    state, cuts = start_plateau(config, 1.0), []
    for _ in range(8):
        state = step_plateau(config, state, 5.0)
        cuts.append(state.cuts)
    assert cuts == [0, 0, 0, 1, 1, 1, 2, 2]  # the first value is an improvement on none


@pytest.mark.parametrize(
    ("batch", "world_size", "expected"),
    [
        (BatchConfig(global_size=128), 4, (128, 32, 1, 32)),
        (BatchConfig(global_size=128, max_micro_batch=16), 2, (128, 64, 4, 16)),
        (BatchConfig(global_size=96, max_micro_batch=20), 3, (96, 32, 2, 16)),
        (BatchConfig(global_size=None, per_rank_size=50), 3, (150, 50, 1, 50)),
        (BatchConfig(global_size=128, max_micro_batch=1000), 1, (128, 128, 1, 128)),
    ],
)
def test_plan(batch, world_size, expected):
    plan = plan_batches(batch, TrainConfig(epochs=3, strategy="ddp"), world_size=world_size, train_size=1000)
    assert (plan.global_size, plan.per_rank_size, plan.micro_batches, plan.micro_size) == expected
    assert plan.steps_per_epoch == 1000 // plan.global_size
    assert plan.total_steps == 3 * plan.steps_per_epoch


@pytest.mark.parametrize(
    ("limit", "world_size", "expected"),
    [
        (None, 1, (128, 8, 1, 16)),
        (None, 4, (32, 2, 1, 16)),
        (None, 8, (16, 1, 1, 16)),
        (100, 1, (128, 8, 1, 16)),
        (8, 2, (64, 8, 2, 8)),
        (5, 8, (16, 4, 4, 4)),
    ],
)
def test_micro_batches_of_a_virtual_rank_do_not_depend_on_the_world_size(limit, world_size, expected):
    """(samples of a rank, its passes, passes of a virtual rank, samples of a pass)"""
    batch = BatchConfig(global_size=128, virtual_ranks=8, max_micro_batch=limit)
    plan = plan_batches(batch, TrainConfig(strategy="exact"), world_size=world_size, train_size=1000)
    assert (plan.per_rank_size, plan.micro_batches, plan.passes, plan.micro_size) == expected


def test_plan_errors_name_what_would_work():
    with pytest.raises(ConfigError, match=r"8 virtual ranks .* 3 ranks; start 1, 2, 4, 8 ranks"):
        plan_batches(BatchConfig(), TrainConfig(strategy="exact"), world_size=3, train_size=1000)
    with pytest.raises(ConfigError, match=r"128 samples .* 3 ranks; set batch.global_size=126 or 129"):
        plan_batches(BatchConfig(global_size=128), TrainConfig(strategy="ddp"), world_size=3, train_size=1000)
    with pytest.raises(ConfigError, match=r"one global batch is 128 samples, the training split has 100"):
        plan_batches(BatchConfig(global_size=128), TrainConfig(strategy="ddp"), world_size=2, train_size=100)


@pytest.mark.parametrize(("rule", "lr"), [("sqrt", 0.02), ("linear", 0.04), ("none", 0.01)])
def test_lr_rule(rule, lr):
    value, reason = scaled_lr(OptimizerConfig(lr=0.01, lr_rule=rule, lr_base_batch=128), 512)
    assert value == pytest.approx(lr)
    assert rule in reason and "512" in reason


def test_warmup_reaches_the_full_rate_and_stays():
    plan = plan_batches(BatchConfig(global_size=10), TrainConfig(strategy="ddp"), world_size=1, train_size=100)
    config = OptimizerConfig(warmup_epochs=0.5)
    assert [warmup_factor(config, plan, step) for step in range(7)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]
    assert warmup_factor(OptimizerConfig(warmup_epochs=0), plan, 0) == 1.0


def test_evaluations_are_due_every_so_many_epochs_and_at_the_end():
    plan = plan_batches(
        BatchConfig(global_size=10), TrainConfig(epochs=5, max_steps=43, strategy="ddp"), world_size=1, train_size=100
    )
    assert [step for step in range(1, 44) if evaluation_due(plan, 2, step)] == [20, 40, 43]
