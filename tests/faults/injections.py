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
import torch.distributed as dist

from dist_cifar import train
from dist_cifar.checkpoint import CheckpointStore
from dist_cifar.distributed import communicator
from dist_cifar.distributed.communicator import Communicator, Vote
from dist_cifar.distributed.failures import Identity
from dist_cifar.strategy import exact
from dist_cifar.strategy.ddp import DdpStrategy
from dist_cifar.strategy.exact import ExactStrategy


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


def hang_while_joining() -> None:
    """The rank waits in the making of a process group, as gloo does for one that was killed while it connected."""
    dist.new_group = lambda *arguments, **options: _hang()  # type: ignore[assignment]


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


def tell(path: str, *others: str) -> None:
    """Appends to `path` what the rank is doing, a line each; then calls what `others` name.

    `joins` (the process group is being made), `joined`, `restores`, `step N` (it begins), `stepped N`, `evaluates`,
    `evaluated`, and from the thread that writes checkpoints `writes`, `written`.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    step = 0

    def say(line: str) -> None:
        os.write(descriptor, f"{line}\n".encode())

    def around(owner: Any, name: str, before: str, after: str | None = None) -> None:
        original = getattr(owner, name)

        def told(*arguments: Any, **options: Any) -> Any:
            say(before)
            result = original(*arguments, **options)
            if after is not None:
                say(after)
            return result

        setattr(owner, name, told)

    def cast(self: Vote, number: int, *answers: bool) -> None:
        nonlocal step
        step = number
        say(f"step {step}")
        original_cast(self, number, *answers)

    def do_step(self: ExactStrategy, lr: float) -> torch.Tensor:
        norm = original_step(self, lr)
        say(f"stepped {step}")
        return norm

    original_cast, original_step = Vote.cast, ExactStrategy.step
    Vote.cast, ExactStrategy.step = cast, do_step  # type: ignore[method-assign]
    around(Communicator, "__init__", "joins", "joined")
    around(CheckpointStore, "load_newest", "restores")
    around(CheckpointStore, "_run", "writes", "written")
    around(train, "evaluate", "evaluates", "evaluated")
    for other in others:
        globals()[other]()


def forget_adams_steps() -> None:
    """A resume that begins to correct Adam's bias anew."""
    original = exact.load_adam

    def load(module: Any, optimizer: Any, tensors: dict[str, torch.Tensor]) -> None:
        forgotten = {name: value * 0 if name.endswith(".step") else value for name, value in tensors.items()}
        original(module, optimizer, forgotten)

    exact.load_adam = load


def repeat_batch() -> None:
    """A resume whose first batch is the last one before it."""
    original, resumed = train._Run.make_batch, _note_resumes()

    def make_batch(self: train._Run, step: int) -> Any:
        return original(self, step - 1 if step > 0 and step in resumed else step)

    train._Run.make_batch = make_batch  # type: ignore[method-assign]


def forget_sums() -> None:
    """A resume that forgets what was summed up since the last log: the weights are right, a row is not."""
    original = train._Run.__init__

    def init(self: train._Run, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.sums.sums.zero_()

    train._Run.__init__ = init  # type: ignore[method-assign]


def _note_resumes() -> list[int]:
    """Takes the step that a run goes on from."""
    original, resumed = train._Run._restore, []

    def restore(self: train._Run, *arguments: Any) -> int | None:
        step = original(self, *arguments)
        resumed.extend([] if step is None else [step])
        return step

    train._Run._restore = restore  # type: ignore[method-assign]
    return resumed


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
