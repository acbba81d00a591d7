"""The time that a rank computes."""

from __future__ import annotations

import pytest
import torch

from dist_cifar.run import timers
from dist_cifar.run.timers import ComputeTimer

CPU = torch.device("cpu")


def test_compute_time_counts_between_start_and_stop(monkeypatch):
    clock = iter([10.0, 11.5, 20.0, 20.25])
    monkeypatch.setattr(timers.time, "perf_counter", lambda: next(clock))
    own = ComputeTimer(CPU)
    for _ in range(2):
        own.start()
        own.stop()
    assert own.take() == 1.75 and own.take() == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compute_time_of_a_gpu():
    own = ComputeTimer(torch.device("cuda"))
    own.start()
    torch.ones(2000, 2000, device="cuda") @ torch.ones(2000, 2000, device="cuda")
    own.stop()
    torch.cuda.synchronize()
    assert own.take() > 0 and own.take() == 0.0
