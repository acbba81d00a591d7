"""What goes wrong inside a rank. Each function is called in the rank, before it starts, and patches what it needs.

`at_step` is the step, counted from 1, in which it happens.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import safetensors.torch
import torch
import torch.distributed as dist

from dist_cifar import trainer
from dist_cifar.data import training_data
from dist_cifar.data.batching import TrainingBatches
from dist_cifar.data.prefetch import Batch
from dist_cifar.distributed import collectives
from dist_cifar.distributed.any_reduce import AsyncAnyReduce
from dist_cifar.distributed.collectives import Communicator
from dist_cifar.distributed.processes import Identity
from dist_cifar.evaluate import Evaluator
from dist_cifar.optim.lr_schedule import WarmupPlateau
from dist_cifar.run import atomic_io, checkpoint
from dist_cifar.run.checkpoint import CheckpointStore
from dist_cifar.run.checkpointing import Restored, RunCheckpoints
from dist_cifar.run.run_dir import RunDir
from dist_cifar.run.training_sums import TrainingSums
from dist_cifar.state import Evaluation
from dist_cifar.strategy.base import Tensors
from dist_cifar.strategy.ddp import DdpStrategy
from dist_cifar.strategy.exact import ExactStrategy
from dist_cifar.tracking.records import RunRecords


def several(*injections: list[Any]) -> None:
    """More than one, each `[name, *arguments]`, in this order."""
    for name, *arguments in injections:
        globals()[name](*arguments)


def raise_at(at_step: int) -> None:
    """A defect of the program."""
    _in_step(at_step, lambda: _raise(ValueError("injected")))


def hang_at(at_step: int) -> None:
    """The main thread never comes back from a file system, or from a GPU's collective; other threads live."""
    _in_step(at_step, _hang)


def stop_before_any_reduce(at_step: int) -> None:
    """The rank stops itself (SIGSTOP) before it begins the any-reduce of a step."""
    original = AsyncAnyReduce.start

    def start(self: AsyncAnyReduce, step: int, *answers: bool) -> None:
        if step == at_step:
            os.kill(os.getpid(), signal.SIGSTOP)
        original(self, step, *answers)

    AsyncAnyReduce.start = start  # type: ignore[method-assign]


def stop_before_joining() -> None:
    """The rank stops itself (SIGSTOP) when the job comes together."""

    def own_identity() -> Identity:
        os.kill(os.getpid(), signal.SIGSTOP)
        raise AssertionError("it was to be killed")

    collectives.own_identity = own_identity


def hang_while_joining() -> None:
    """The rank waits in the making of a process group, as gloo does for one that was killed while it connected."""
    dist.new_group = lambda *arguments, **options: _hang()  # type: ignore[assignment]


def skip_any_reduce(at_step: int) -> None:
    """One collective is left out."""
    original = AsyncAnyReduce.start

    def start(self: AsyncAnyReduce, step: int, *answers: bool) -> None:
        if step != at_step:
            original(self, step, *answers)

    AsyncAnyReduce.start = start  # type: ignore[method-assign]


def skip_gather(number: int) -> None:
    """The gather of this number is left out: 0 is in the making of the communicator, the next ones are in the logs."""
    original, calls = Communicator.all_gather_object, 0

    def all_gather_object(self: Communicator, value: Any, name: str = "gather") -> list[Any]:
        nonlocal calls
        if name == "gather" and self.world_size > 1:
            calls += 1
            if calls == number + 1:
                return [value] * self.world_size
        return original(self, value, name)

    Communicator.all_gather_object = all_gather_object  # type: ignore[method-assign]


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


def signal_at(at_step: int, *names: str) -> None:
    """The rank is sent these signals."""
    _in_step(at_step, lambda: _signal(*names))


def slow_steps(seconds: float) -> None:
    """Every step takes so much longer."""
    _in_step(None, lambda: time.sleep(seconds))


def clock_back(seconds: float, at_step: int | None = None) -> None:
    """The wall clock is set back by somebody: before the job begins, or in a step."""
    original = time.time

    def set_back() -> None:
        time.time = lambda: original() - seconds

    if at_step is None:
        set_back()
    else:
        _in_step(at_step, set_back)


def poison(at_step: int) -> None:
    """The images of this rank are NaN."""
    original = TrainingBatches.make

    def make(self: TrainingBatches, step: int) -> Batch:
        batch = original(self, step)
        if step + 1 == at_step:
            batch.inputs.fill_(float("nan"))
        return batch

    TrainingBatches.make = make  # type: ignore[method-assign]


def change_data() -> None:
    """The data set's files hold something else than before."""
    original = training_data.load_dataset

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        return dataclasses.replace(original(*arguments, **options), content_sha256="0" * 64)

    training_data.load_dataset = load_dataset


def die_at_lr_reduction(when: str) -> None:
    """SIGKILL around the first evaluation that reduces the learning rate: `before` the schedule learns of it, or
    `after` the reduction is logged."""
    observe, lr_reduced = WarmupPlateau.observe, RunRecords.lr_reduced

    def observed(self: WarmupPlateau, evaluation: Evaluation) -> str | None:
        if when == "before" and observe(copy.copy(self), evaluation) is not None:
            _signal("SIGKILL")
        return observe(self, evaluation)

    def logged(self: RunRecords, *arguments: Any, **options: Any) -> None:
        lr_reduced(self, *arguments, **options)
        if when == "after":
            _signal("SIGKILL")

    WarmupPlateau.observe, RunRecords.lr_reduced = observed, logged  # type: ignore[method-assign]


def signal_in_the_final_test(name: str) -> None:
    """The rank is sent this signal when all is trained and saved."""

    def final_evaluation(*arguments: Any, **options: Any) -> NoReturn:
        _signal(name)
        raise AssertionError("the signal did not end the test")

    trainer.final_evaluation = final_evaluation


def die_before_summary() -> None:
    """SIGKILL when a run has its result and has not written it."""
    RunDir.write_summary = lambda self, summary: _signal("SIGKILL")  # type: ignore[method-assign]


# --- the disk ----------------------------------------------------------------------------------------------------


def in_save(at_step: int, call: str, name: str, number: int, what: str) -> None:
    """Something happens in the background, while the checkpoint of a step is written.

    It happens before the `number`-th (from 1) of the calls `os.<call>` on a path whose last part matches the pattern
    `name`. `what` is a signal, the name of an error (`EROFS`) that this and all later calls meet, or the path of a file
    that somebody else writes until nothing more fits. SIGKILL lets half of the bytes of a write out first.
    """
    commit, step, count = CheckpointStore._commit, None, 0

    def noted(self: CheckpointStore, saved_step: int, *arguments: Any) -> None:
        nonlocal step
        step = saved_step
        commit(self, saved_step, *arguments)

    class Os:
        def __getattr__(self, attribute: str) -> Any:
            original = getattr(os, attribute)
            if attribute != call or step != at_step or threading.current_thread().name != "checkpoint":
                return original

            def called(path: Any, *arguments: Any) -> Any:
                nonlocal count
                place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
                count += re.fullmatch(name, os.path.basename(place)) is not None
                if count >= number and what.startswith("E"):
                    code = getattr(errno, what)
                    raise OSError(code, os.strerror(code))
                if count == number:
                    count += 1
                    if call == "write" and what == "SIGKILL":
                        os.write(path, arguments[0][: len(arguments[0]) // 2])
                    if what.startswith("/"):
                        _fill_disk(what)
                    else:
                        _signal(what)
                return original(path, *arguments)

            return called

    CheckpointStore._commit = noted  # type: ignore[method-assign]
    atomic_io.os = Os()  # type: ignore[assignment]


def hold_writes() -> None:
    """The disk is as slow as can be: each checkpoint begins to be written when somebody waits for it."""
    wait, run, waited = CheckpointStore.wait, CheckpointStore._run, threading.Event()

    def noted(self: CheckpointStore, **options: bool) -> None:
        if self._thread is not None:
            waited.set()
        wait(self, **options)

    def held(self: CheckpointStore, *arguments: Any) -> None:
        waited.wait()
        waited.clear()
        run(self, *arguments)

    CheckpointStore.wait, CheckpointStore._run = noted, held  # type: ignore[method-assign]


def free_disk(at_step: int, path: str) -> None:
    """Somebody else deletes the file `path`."""
    _in_step(at_step, lambda: Path(path).unlink())


# --- mutants of the product --------------------------------------------------------------------------------------


def forget_last_save() -> None:
    """A mutant: the end of a run, or a signal, does not wait for the checkpoint that is being written."""
    wait = CheckpointStore.wait

    def forgetful(self: CheckpointStore, *, must_succeed: bool = False) -> None:
        if not must_succeed:
            wait(self)

    CheckpointStore.wait = forgetful  # type: ignore[method-assign]


def trust_checkpoints() -> None:
    """A mutant: checkpoints are not verified."""

    def read(path: Path) -> checkpoint.Checkpoint:
        tensors = {file.stem: safetensors.torch.load(file.read_bytes()) for file in path.glob("*.safetensors")}
        state = checkpoint.json.loads((path / "state.json").read_text())
        return checkpoint.Checkpoint(step=state["train_state"]["step"], path=path, tensors=tensors, state=state)

    checkpoint.read_checkpoint = read


def restore_locally() -> None:
    """A mutant: every rank loads what its own directory holds."""
    original = RunCheckpoints.restore

    def restore(self: RunCheckpoints, **options: bool) -> Restored | None:
        with (
            mock.patch.object(Communicator, "run_on_rank0", lambda self, function: function()),
            mock.patch.object(Communicator, "broadcast_tensors", lambda self, tensors: dict(tensors or {})),
        ):
            return original(self, **options)

    RunCheckpoints.restore = restore  # type: ignore[method-assign]


def blame(whom: str) -> None:
    """The mutants of the roll call: it blames rank 0, or the one that asks, whatever it has found."""
    from dist_cifar.distributed import failure_detector

    original = failure_detector.conclude

    def conclude(*arguments: Any, by: int, **options: Any) -> failure_detector.Failure | None:
        failure = original(*arguments, by=by, **options)
        if failure is None:
            return None
        return failure_detector.dataclasses.replace(failure, rank=0 if whom == "lowest" else by)

    failure_detector.conclude = conclude


def _fill_disk(path: str) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _signal(*names: str) -> None:
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))


def tell(path: str, *others: str) -> None:
    """Appends to `path` what the rank is doing, a line each; then calls what `others` name.

    `joins` (the process group is being made), `joined`, `restores`, `step N` (it begins), `advance N`, `evaluates`,
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

    def start(self: AsyncAnyReduce, number: int, *answers: bool) -> None:
        nonlocal step
        step = number
        say(f"step {step}")
        original_start(self, number, *answers)

    def do_step(self: ExactStrategy, lr: float) -> torch.Tensor:
        norm = original_step(self, lr)
        say(f"advance {step}")
        return norm

    original_start, original_step = AsyncAnyReduce.start, ExactStrategy.step
    AsyncAnyReduce.start, ExactStrategy.step = start, do_step  # type: ignore[method-assign]
    around(Communicator, "__init__", "joins", "joined")
    around(CheckpointStore, "load_newest", "restores")
    around(CheckpointStore, "_run", "writes", "written")
    around(Evaluator, "validate", "evaluates", "evaluated")
    around(Evaluator, "test", "evaluates", "evaluated")
    for other in others:
        globals()[other]()


def forget_adams_steps() -> None:
    """A mutant: a resume that begins to correct Adam's bias anew."""
    original = ExactStrategy.load

    def load(self: ExactStrategy, model: Tensors, optimizer: Tensors, ranks: Tensors) -> None:
        assert any(name.endswith(".step") for name in optimizer)
        forgotten = {name: value * 0 if name.endswith(".step") else value for name, value in optimizer.items()}
        original(self, model, forgotten, ranks)

    ExactStrategy.load = load  # type: ignore[method-assign]


def repeat_batch() -> None:
    """A mutant: a resume whose first batch is the last one before it."""
    make, restore = TrainingBatches.make, RunCheckpoints.restore
    resumed: list[int] = []

    def restored(self: RunCheckpoints, **options: bool) -> Restored | None:
        found = restore(self, **options)
        resumed.extend([] if found is None else [found.train_state.step])
        return found

    def made(self: TrainingBatches, step: int) -> Batch:
        return make(self, step - 1 if step > 0 and step in resumed else step)

    TrainingBatches.make, RunCheckpoints.restore = made, restored  # type: ignore[method-assign]


def forget_sums() -> None:
    """A mutant: a resume that forgets what was summed up since the last log: the weights are right, a row is not."""
    original = TrainingSums.reset
    TrainingSums.reset = lambda self, *totals: original(self)  # type: ignore[method-assign]


def _raise(error: Exception) -> None:
    raise error


def _hang() -> None:
    while True:
        time.sleep(3600)


def _in_step(at_step: int | None, act: Callable[[], None]) -> None:
    """Calls `act` when this rank has begun the any-reduce and the step is under way; None is every step."""
    original = AsyncAnyReduce.start

    def start(self: AsyncAnyReduce, step: int, *answers: bool) -> None:
        original(self, step, *answers)
        if at_step is None or step == at_step:
            act()

    AsyncAnyReduce.start = start  # type: ignore[method-assign]
