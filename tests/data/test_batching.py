"""How a global batch is divided, and when an evaluation is due."""

from __future__ import annotations

import pytest

from dist_cifar.config import BatchConfig, TrainConfig
from dist_cifar.data.batching import plan_batches
from dist_cifar.data.due import evaluation_due, schedule_due
from dist_cifar.errors import ConfigError


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
    plan = plan_batches(batch, TrainConfig(epochs=3), slices=world_size, rank=0, world_size=world_size, train_size=1000)
    assert (plan.global_size, plan.per_rank_size, plan.micro_batches, plan.micro_sizes[0]) == expected
    assert set(plan.micro_sizes) == {expected[-1]} and set(plan.weights) == {1}
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
    batch = BatchConfig(global_size=128, max_micro_batch=limit)
    plan = plan_batches(batch, TrainConfig(), slices=8, rank=0, world_size=world_size, train_size=1000)
    assert (plan.per_rank_size, plan.micro_batches, plan.passes, plan.micro_sizes[0]) == expected
    assert set(plan.micro_sizes) == {expected[-1]} and set(plan.weights) == {1}


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("slices", [8, 0])
def test_the_ranks_together_have_each_sample_once_and_in_order(world_size, limit, slices):
    """8 virtual ranks, or a slice for each rank: of 120 samples, which 7 does not divide."""
    batch = BatchConfig(global_size=120, max_micro_batch=limit)
    plans = [
        plan_batches(
            batch, TrainConfig(), slices=slices or world_size, rank=rank, world_size=world_size, train_size=1000
        )
        for rank in range(world_size)
    ]
    assert [plan.start for plan in plans] == [sum(p.per_rank_size for p in plans[:rank]) for rank in range(world_size)]
    assert sum(plan.per_rank_size for plan in plans) == 120
    assert [i for plan in plans for i in plan.slices] == list(range(slices or world_size))
    assert [plan.first_pass for plan in plans] == [sum(p.micro_batches for p in plans[:r]) for r in range(world_size)]
    sizes = [size for plan in plans for size in plan.micro_sizes]
    assert max(sizes) <= (limit or 120) and max(sizes) - min(sizes) <= 1
    if slices:  # each pass has the same shape on every number of ranks
        assert set(sizes) == {5 if limit else 15}
    else:  # as many passes, since each of them is a collective
        assert len({plan.micro_batches for plan in plans}) == 1
    # The mean over all passes of weighted means is the mean over all samples.
    weights = [weight for plan in plans for weight in plan.weights]
    assert sum(weights) / len(weights) == pytest.approx(1)
    assert [w / len(weights) for w in weights] == pytest.approx([size / 120 for size in sizes])


def test_a_batch_larger_than_the_split_is_an_error_that_names_both():
    with pytest.raises(ConfigError, match=r"one global batch is 128 samples, the training split has 100"):
        plan_batches(BatchConfig(global_size=128), TrainConfig(), slices=2, rank=0, world_size=2, train_size=100)


def test_evaluations_are_due_every_so_many_epochs_and_at_the_end():
    batch, train = BatchConfig(global_size=10), TrainConfig(epochs=5, max_steps=43)
    plan = plan_batches(batch, train, slices=1, rank=0, world_size=1, train_size=100)
    assert [step for step in range(1, 44) if evaluation_due(plan, 2, step)] == [20, 40, 43]
    assert [step for step in range(1, 44) if schedule_due(plan, 2, step)] == [20, 40]


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 50), (0.07, 7), (0.075, 8), (1.1, 110), (2.0, 200), (1e-9, 1)])
def test_epochs_may_be_a_fraction_which_is_meant_in_decimal(epochs, steps):
    """0.07 x 100 is more than 7 in floating point."""
    train = TrainConfig(epochs=epochs)
    plan = plan_batches(BatchConfig(global_size=10), train, slices=1, rank=0, world_size=1, train_size=1000)
    assert plan.steps_per_epoch == 100 and plan.total_steps == steps
    assert evaluation_due(plan, 1, steps) and schedule_due(plan, 1, steps) is (steps % 100 == 0)
