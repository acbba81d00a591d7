"""Sums of the training: the same however the samples are split and in whatever order they are added."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dist_cifar.run import training_sums
from dist_cifar.run.training_sums import TrainingSums
from dist_cifar.state import StepTotals

CPU = torch.device("cpu")


def micro_batch(index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean loss, logits and labels of a micro-batch; losses of many magnitudes."""
    generator = torch.Generator().manual_seed(index)
    loss = torch.rand((), generator=generator) * 10.0 ** (index % 9 - 5)
    return loss, torch.randn(12, 10, generator=generator), torch.randint(10, (12,), generator=generator)


def total(shares: list[list[int]], *, may_skip: bool = False) -> StepTotals:
    """The sum over ranks, each of which adds up the micro-batches of its share in order."""
    rows = []
    for share in shares:
        sums = TrainingSums(CPU, may_skip=may_skip)
        for index in share:
            sums.add(*micro_batch(index))
        rows.append(sums.totals())
    return StepTotals.sum(rows)


def splits() -> list[list[list[int]]]:
    order, shuffled = list(range(64)), list(range(64))
    random.Random(0).shuffle(shuffled)
    return [[order], [order[:32], order[32:]], [order[i::4] for i in range(4)], [shuffled]]


def test_sums_do_not_depend_on_the_split_or_the_order():
    first, *others = [total(split) for split in splits()]
    assert all(other == first for other in others)
    expected = math.fsum(float(micro_batch(i)[0]) * 12 for i in range(64))
    assert first.loss_sum == pytest.approx(expected, abs=64 * 2.0**-24)
    assert first.correct == sum(
        int((logits.argmax(1) == labels).sum()) for _, logits, labels in map(micro_batch, range(64))
    )
    assert first.samples == 64 * 12


def test_sums_of_numbers_that_are_not_rounded_do(monkeypatch):
    """The mutant."""
    monkeypatch.setattr(training_sums, "_QUANTUM", 2.0**-1000)
    first, *others = [total(split) for split in splits()]
    assert any(other != first for other in others)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_or_is_left_out_and_counted(bad):
    loss, logits, labels = micro_batch(0)
    for may_skip in (False, True):
        sums = TrainingSums(CPU, may_skip=may_skip)
        sums.add(torch.tensor(bad), logits, labels)
        sums.add(loss, logits, labels)
        for norm in (2.0, bad, 3.0):
            sums.add_step(torch.tensor(norm))
        totals = sums.totals()
        if may_skip:
            alone = TrainingSums(CPU, may_skip=True)
            alone.add(loss, logits, labels)
            assert totals == alone.totals()._replace(norm_sum=5.0, steps=2.0, skipped=1.0) and totals.is_finite
        else:
            assert not math.isfinite(totals.loss_sum) and not math.isfinite(totals.norm_sum)
            assert (totals.steps, totals.skipped) == (3.0, 0.0) and not totals.is_finite


def test_sums_that_are_taken_start_again_and_can_be_restored():
    sums = TrainingSums(CPU, may_skip=False)
    sums.add(*micro_batch(3))
    sums.add_step(torch.tensor(2.5))
    taken = sums.take()
    assert taken.samples == 12 and taken.norm_sum == 2.5 and sums.totals() == StepTotals()
    sums.reset(taken)
    assert sums.totals() == taken
