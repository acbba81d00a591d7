"""The clock of a rank that connects to the others."""

from __future__ import annotations

import threading
from typing import ClassVar

import pytest
import torch

from dist_cifar.distributed import collectives
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import LaunchError
from dist_cifar.job.enter import connect


class Timer:
    """A timer that does not run; each that was made is in `made`."""

    made: ClassVar[list[Timer]] = []

    def __init__(self, seconds: float, function: object, arguments: list[object]) -> None:
        self.seconds, self.state = seconds, "new"
        Timer.made.append(self)

    def start(self) -> None:
        self.state = "runs"

    def cancel(self) -> None:
        self.state = "stopped"


def states() -> list[str]:
    return [timer.state for timer in Timer.made]


@pytest.mark.parametrize("fails", [False, True])
def test_the_clock_starts_again_when_all_ranks_have_met(monkeypatch, fails):
    """What follows is the start of the backend, which is slow with NCCL and says nothing of ranks that are missing."""
    seen = []

    def communicator(env, *, met, **options):
        seen.append(states())
        met()
        seen.append(states())
        if fails:
            raise LaunchError("launch: no backend")
        return "connected"

    monkeypatch.setattr(Timer, "made", [])
    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(collectives, "Communicator", communicator)
    env = DistEnv(rank=1, world_size=2, local_rank=1, local_world_size=2)
    if fails:
        with pytest.raises(LaunchError, match="no backend"):
            connect(env, torch.device("cpu"), 60.0, dict)
    else:
        assert connect(env, torch.device("cpu"), 60.0, dict) == "connected"
    assert seen == [["runs"], ["stopped", "runs"]] and states() == ["stopped", "stopped"]
    assert {timer.seconds for timer in Timer.made} == {61.0}
