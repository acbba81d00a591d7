"""The end of the job's time."""

from __future__ import annotations

import pytest

from dist_cifar import deadline
from dist_cifar.deadline import Deadline, seconds_left


@pytest.mark.parametrize(
    ("environ", "limit", "expected"),
    [
        ({}, None, None),
        ({}, 30.0, 30.0),
        ({"SLURM_JOB_END_TIME": "1100"}, None, 100.0),
        ({"SLURM_JOB_END_TIME": "1100"}, 30.0, 30.0),
        ({"SLURM_JOB_END_TIME": "1010"}, 30.0, 10.0),
        ({"SLURM_JOB_END_TIME": "Unknown"}, None, None),
        ({"SLURM_JOB_END_TIME": "900"}, None, -100.0),
    ],
)
def test_the_nearer_end_counts(environ, limit, expected):
    assert seconds_left(environ, limit, wall_time=1000.0) == expected


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, to be set; the wall clock raises."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(deadline, "time", clock)
    return clock


def test_twice_the_longest_interval_is_kept_in_reserve(clock):
    end = Deadline(100.0)
    clock.now = 1.0
    assert not end.is_near()
    clock.now = 21.0  # an evaluation: 20 seconds
    assert not end.is_near()
    clock.now = 40.0
    assert not end.is_near()
    clock.now = 44.9
    assert not end.is_near()
    clock.now = 45.1  # 54.9 left, 2 x 20 and the reserve of 15 do not fit
    assert end.is_near()


def test_no_end_is_never_near(clock):
    end = Deadline(None)
    clock.now = 1e9
    assert not end.is_near()
