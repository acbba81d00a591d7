"""What goes wrong inside a rank. Each function is called in the rank, before it starts, and patches what it needs.

`at_step` is the step, counted from 1, in which it happens.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from dist_cifar.distributed import communicator
from dist_cifar.distributed.communicator import Communicator, Vote
from dist_cifar.distributed.failures import Identity
from dist_cifar.strategy.ddp import DdpStrategy


def raise_at(at_step: int) -> None:
    """A defect of the program."""
    _after_vote(at_step, lambda: _raise(ValueError("injected")))


def hang_at(at_step: int) -> None:
    """The main thread never comes back from a file system, or from a GPU's collective; other threads live."""
    _after_vote(at_step, _hang)


def stop_before_vote(at_step: int) -> None:
    """The rank stops itself (SIGSTOP) before it votes."""
    original = Vote.cast

    def cast(self: Vote, step: int, *answers: bool) -> None:
        if step == at_step:
            os.kill(os.getpid(), signal.SIGSTOP)
        original(self, step, *answers)

    Vote.cast = cast  # type: ignore[method-assign]


def stop_before_joining() -> None:
    """The rank stops itself (SIGSTOP) when the job comes together."""

    def own_identity() -> Identity:
        os.kill(os.getpid(), signal.SIGSTOP)
        raise AssertionError("it was to be killed")

    communicator.own_identity = own_identity


def skip_vote(at_step: int) -> None:
    """One collective is left out."""
    original = Vote.cast

    def cast(self: Vote, step: int, *answers: bool) -> None:
        if step != at_step:
            original(self, step, *answers)

    Vote.cast = cast  # type: ignore[method-assign]


def skip_gather(number: int) -> None:
    """The gather of this number is left out: 0 is in the making of the communicator, n in the n-th save."""
    original, calls = Communicator.gather, 0

    def gather(self: Communicator, value: Any, name: str = "gather") -> list[Any]:
        nonlocal calls
        if name == "gather" and self._control is not None:
            calls += 1
            if calls == number + 1:
                return [value] * self.world_size
        return original(self, value, name)

    Communicator.gather = gather  # type: ignore[method-assign]


def flip_bit(at_step: int, name: str) -> None:
    """The lowest bit of the first element of the parameter `name` changes, as a cosmic ray would have it."""
    original = DdpStrategy.step
    steps = 0

    def step(self: DdpStrategy, lr: float) -> torch.Tensor:
        nonlocal steps
        norm = original(self, lr)
        steps += 1
        if steps == at_step:
            parameter = dict(self.module.named_parameters())[name]
            parameter.data.reshape(-1)[:1].view(torch.int32).bitwise_xor_(1)
        return norm

    DdpStrategy.step = step  # type: ignore[method-assign]


def blame(whom: str) -> None:
    """The mutants of the roll call: it blames rank 0, or the one that asks, whatever it has found."""
    from dist_cifar.distributed import failures

    original = failures.conclude

    def conclude(*arguments: Any, by: int, **options: Any) -> failures.Failure | None:
        failure = original(*arguments, by=by, **options)
        if failure is None:
            return None
        return failures.dataclasses.replace(failure, rank=0 if whom == "lowest" else by)

    failures.conclude = conclude


def _raise(error: Exception) -> None:
    raise error


def _hang() -> None:
    while True:
        time.sleep(3600)


def _after_vote(at_step: int, act: Callable[[], None]) -> None:
    """`act` when this rank has cast its vote and the step is under way."""
    original = Vote.cast

    def cast(self: Vote, step: int, *answers: bool) -> None:
        original(self, step, *answers)
        if step == at_step:
            act()

    Vote.cast = cast  # type: ignore[method-assign]
