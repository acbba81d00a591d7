"""Sums of the training: the same however the samples are split and in whatever order they are added."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dist_cifar import state
from dist_cifar.state import ComputeTimer, TrainingSums

CPU = torch.device("cpu")


def micro_batch(index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean loss, logits and labels of a micro-batch; losses of many magnitudes."""
    generator = torch.Generator().manual_seed(index)
    loss = torch.rand((), generator=generator) * 10.0 ** (index % 9 - 5)
    return loss, torch.randn(12, 10, generator=generator), torch.randint(10, (12,), generator=generator)


def total(shares: list[list[int]], *, may_skip: bool = False) -> list[float]:
    """The sum over ranks, each of which adds up the micro-batches of its share in order."""
    rows = []
    for share in shares:
        sums = TrainingSums(CPU, may_skip=may_skip)
        for index in share:
            sums.add(*micro_batch(index))
        rows.append(sums.sums.tolist())
    return [sum(column) for column in zip(*rows, strict=True)]


def splits() -> list[list[list[int]]]:
    order, shuffled = list(range(64)), list(range(64))
    random.Random(0).shuffle(shuffled)
    return [[order], [order[:32], order[32:]], [order[i::4] for i in range(4)], [shuffled]]


def test_sums_do_not_depend_on_the_split_or_the_order():
    first, *others = [total(split) for split in splits()]
    assert all(other == first for other in others)
    expected = math.fsum(float(micro_batch(i)[0]) * 12 for i in range(64))
    assert first[0] == pytest.approx(expected, abs=64 * 2.0**-24)
    assert first[1] == sum(int((logits.argmax(1) == labels).sum()) for _, logits, labels in map(micro_batch, range(64)))
    assert first[2] == 64 * 12


def test_sums_of_numbers_that_are_not_rounded_do(monkeypatch):
    """The mutant."""
    monkeypatch.setattr(state, "_QUANTUM", 2.0**-1000)
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
        row = sums.sums.tolist()
        if may_skip:
            alone = TrainingSums(CPU, may_skip=True)
            alone.add(loss, logits, labels)
            assert row == [*alone.sums[:3].tolist(), 5.0, 2.0, 1.0]
        else:
            assert not math.isfinite(row[0]) and not math.isfinite(row[3]) and row[4:] == [3.0, 0.0]


def test_own_time_counts_between_start_and_stop(monkeypatch):
    clock = iter([10.0, 11.5, 20.0, 20.25])
    monkeypatch.setattr(state.time, "perf_counter", lambda: next(clock))
    own = ComputeTimer(CPU)
    for _ in range(2):
        own.start()
        own.stop()
    assert own.take() == 1.75 and own.take() == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_own_time_of_a_gpu():
    own = ComputeTimer(torch.device("cuda"))
    own.start()
    torch.ones(2000, 2000, device="cuda") @ torch.ones(2000, 2000, device="cuda")
    own.stop()
    torch.cuda.synchronize()
    assert own.take() > 0 and own.take() == 0.0
