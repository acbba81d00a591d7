"""The times of a job: they hold what they promise for every `run.timeout_seconds`, and refuse what breaks it."""

from __future__ import annotations

import pytest

from dist_cifar.distributed.timeouts import Timeouts


@pytest.mark.parametrize("seconds", [0.1, 5.0, 600.0, 1e6])
def test_every_timeout_of_a_run_is_possible(seconds):
    timeouts = Timeouts(run_seconds=seconds)
    assert timeouts.control_seconds < seconds < timeouts.nccl_seconds


@pytest.mark.parametrize(
    "change",
    [
        {"control_share": 1.0},
        {"nccl_margin_seconds": 0.0},
        {"hold_seconds": 3.0},
        {"connect_seconds": 3.0},
        {"poll_seconds": 1.0},
        {"waiting_seconds": 3.5},
        {"together_seconds": 4.0},
        {"report_seconds": 14.0},
    ],
)
def test_times_that_end_in_the_wrong_order_are_refused(change):
    with pytest.raises(AssertionError):
        Timeouts(run_seconds=600.0, **change)
