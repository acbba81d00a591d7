"""The checkpoint store against death, power loss, full disks and damage at every point where they can strike.

The checks are functions of the code under test. Each is run on the store itself, where it must hold, and on mutants
of it, where it must fail: a check that no mutant fails would prove nothing. Where a check needs a write to be under
way it holds the writing thread at a gate, and nothing depends on how long anything takes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dist_cifar.errors import CheckpointError
from dist_cifar.run import atomic_io, checkpoint
from dist_cifar.run.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from tests import REPOSITORY


@dataclass(frozen=True)
class Code:
    """The code under test: the modules as imported, or a mutant of them."""

    checkpoint: ModuleType = checkpoint
    files: ModuleType = files

    def store(self, directory: Path, keep_last: int = 1, **options: Any) -> tuple[CheckpointStore, list[str]]:
        said: list[str] = []
        return self.checkpoint.CheckpointStore(directory, keep_last=keep_last, say=said.append, **options), said


REAL = Code()


# --- a disk on which everything can go wrong ---------------------------------------------------------------------


class Death(BaseException):
    """The process is gone: nothing can catch this and still do something."""


class Disk:
    """Stands in for `os` in `dist_cifar.run.atomic_io`; counts the calls that change the disk and fails at one of them.

    `die_at`: the call before which the process dies; a write gets half of its bytes out first. `full_at`, `broken_at`:
    the call from which on nothing can be written any more (ENOSPC), or changed at all (EROFS). Syncs are recorded
    only. `lose_power` then takes back what was never synced: the content of files, and the names in directories.
    """

    def __init__(self, *, die_at: int | None = None, full_at: int | None = None, broken_at: int | None = None) -> None:
        self.calls = 0
        self.died = False
        self._die_at, self._full_at, self._broken_at = die_at, full_at, broken_at
        self._unsynced_files: set[int] = set()
        self._unsynced_names: list[tuple[int, Callable[[Path], None]]] = []  # (directory, how to undo the change)

    def __getattr__(self, name: str):
        return getattr(os, name)

    def open(self, path, flags, mode=0o777):
        if not flags & os.O_CREAT:
            return os.open(path, flags, mode)
        self._call(grows=True)
        new = not os.path.exists(path)
        descriptor = os.open(path, flags, mode)
        inode = os.fstat(descriptor).st_ino
        self._unsynced_files.add(inode)
        if new:
            self._changed(path, lambda root: _find(root, inode).unlink())
        return descriptor

    def write(self, descriptor, data):
        try:
            self._call(grows=True)
        except Death:
            os.write(descriptor, data[: len(data) // 2])
            raise
        return os.write(descriptor, data)

    def fsync(self, descriptor):
        self._call(grows=True)  # a full disk may show only here
        inode = os.fstat(descriptor).st_ino
        self._unsynced_files.discard(inode)
        self._unsynced_names = [change for change in self._unsynced_names if change[0] != inode]

    def mkdir(self, path):
        self._call(grows=True)
        os.mkdir(path)
        self._changed(path, lambda root: shutil.rmtree(path))

    def rmdir(self, path):
        self._call()
        os.rmdir(path)
        self._changed(path, lambda root: os.mkdir(path))

    def unlink(self, path):
        self._call()
        content = Path(path).read_bytes()
        os.unlink(path)
        self._changed(path, lambda root: Path(path).write_bytes(content))

    def replace(self, old, new):
        self._call()
        replaced = Path(new).read_bytes() if os.path.isfile(new) else None
        os.replace(old, new)

        def undo(root: Path) -> None:
            os.replace(new, old)
            if replaced is not None:
                Path(new).write_bytes(replaced)

        self._changed(new, undo)

    def lose_power(self, root: Path, is_lost: Callable[[], bool]) -> None:
        """Unsynced content is gone; each unsynced change of a name is gone if `is_lost` says so."""
        for path in root.rglob("*"):
            if path.is_file() and path.stat().st_ino in self._unsynced_files:
                path.write_bytes(b"")
        for _, undo in reversed(self._unsynced_names):
            if is_lost():
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # its directory went first
                    undo(root)

    def _call(self, grows: bool = False) -> None:
        number, self.calls = self.calls, self.calls + 1
        if self.died or number == self._die_at:
            self.died = True
            raise Death
        if grows and self._full_at is not None and number >= self._full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._broken_at is not None and number >= self._broken_at:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def _changed(self, path, undo: Callable[[Path], None]) -> None:
        self._unsynced_names.append((os.stat(Path(path).parent).st_ino, undo))


def _find(root: Path, inode: int) -> Path:
    for path in root.rglob("*"):
        if path.lstat().st_ino == inode:
            return path
    raise FileNotFoundError


@contextlib.contextmanager
def using(code: Code, disk: Any) -> Iterator[Any]:
    before, code.files.os = code.files.os, disk
    try:
        yield disk
    finally:
        code.files.os = before


# --- what is saved, and whether it is what was saved -------------------------------------------------------------


@functools.cache
def tensors_of(mark: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(mark)
    model = {"weight": torch.randn(4, 3, generator=generator), "count": torch.tensor(mark)}
    return {"model": model, "optimizer": {"weight.exp_avg": torch.randn(4, 3, generator=generator)}}


def save(store: CheckpointStore, step: int, mark: int, *, best: bool = False) -> Path:
    """Saves in the background and waits; returns the directory."""
    store.begin_save(step, tensors_of(mark), {"mark": mark}, best=best)
    store.wait()
    paths = sorted(store.directory.glob(f"step-{step:08d}*"), key=lambda path: checkpoint._position(path.name))
    assert paths, f"nothing was saved for step {step}"
    return paths[-1]


def mark_of(loaded: checkpoint.Checkpoint | None) -> int | None:
    """Which of the saves this is, after a look at every bit of it."""
    if loaded is None:
        return None
    mark = loaded.state["mark"]
    wanted = tensors_of(mark)
    assert loaded.tensors.keys() == wanted.keys()
    for stem, group in wanted.items():
        assert weights_sha256(loaded.tensors[stem]) == weights_sha256(group)
    return mark


def names(directory: Path) -> set[str]:
    return set(os.listdir(directory)) if directory.exists() else set()


# --- death -------------------------------------------------------------------------------------------------------

SCENARIOS: dict[str, tuple[list[tuple[int, bool]], tuple[int, bool]]] = {
    "first": ([], (10, True)),
    "next": ([(10, True), (20, False)], (30, False)),
    "new best": ([(10, True), (20, False)], (30, True)),
    "same step": ([(10, True), (20, False)], (20, False)),
    "same step, nothing else": ([(20, True)], (20, True)),
}
"""(step, best) of the saves before, and of the save that is interrupted."""

COIN = random.Random(0)
LOSSES: dict[str, Callable[[], bool] | None] = {
    "none": None,
    "all": lambda: True,
    "some": lambda: COIN.random() < 0.5,
}
"""What is lost with the process: nothing (a kill), or what was not synced (a power cut)."""


def check_state(code: Code, directory: Path, newest: set[int | None], best: set[int | None]) -> None:
    """A fresh store loads one of the marks, without a complaint, and all that calls itself a checkpoint is good."""
    store, said = code.store(directory)
    assert mark_of(store.load_newest()) in newest
    assert mark_of(store.load_best()) in best
    assert said == []
    for path in directory.glob("step-*"):
        code.checkpoint.read_checkpoint(path)


def check_death(code: Code, root: Path) -> int:
    """Dies before each call of each scenario; returns how many calls that were."""
    deaths = 0
    for (scenario, (before, (step, best))), loss in itertools.product(SCENARIOS.items(), LOSSES):
        prepared, mark = root / f"{scenario} {loss}", len(before)
        with using(code, Disk()):
            for number, (earlier, was_best) in enumerate(before):
                save(code.store(prepared)[0], earlier, number, best=was_best)
        for die_at in itertools.count():
            directory = root / scenario / loss / str(die_at)
            if before:
                shutil.copytree(prepared, directory)
            with using(code, Disk(die_at=die_at)) as disk, contextlib.suppress(Death):
                save(code.store(directory)[0], step, mark, best=best)
            if disk.died and LOSSES[loss]:
                disk.lose_power(root, is_lost=LOSSES[loss])

            old_best = max((m for m, (_, was_best) in enumerate(before) if was_best), default=None)
            check_state(
                code,
                directory,
                newest={mark, mark - 1 if before else None} if disk.died else {mark},
                best={mark, old_best} if disk.died and best else {mark if best else old_best},
            )
            with using(code, Disk()):
                path = save(code.store(directory)[0], 40, mark + 1, best=True)
            check_state(code, directory, newest={mark + 1}, best={mark + 1})
            assert names(directory) == {path.name, "latest", "best"}
            shutil.rmtree(root / scenario)
            if not disk.died:
                deaths += die_at
                break
    return deaths


def check_deaths_in_a_row(code: Code, root: Path) -> None:
    """Each save dies at a random call, over the remains of the ones before; what was loaded last is never lost."""
    dice = random.Random(1)
    for run in range(40):
        directory = root / str(run)
        loaded, step = None, 0
        for mark in range(6):
            step += dice.choice([0, 10])
            with using(code, Disk(die_at=dice.randrange(60))) as disk, contextlib.suppress(Death):
                save(code.store(directory)[0], step, mark, best=dice.random() < 0.5)
            if disk.died:
                disk.lose_power(root, is_lost=lambda: dice.random() < 0.5)
            store, said = code.store(directory)
            newest = mark_of(store.load_newest())
            assert newest in ({loaded, mark} if disk.died else {mark})
            assert said == []
            loaded = newest
        shutil.rmtree(directory)


RULES = {"keep_last": 1, "keep_best": 2, "keep_every_steps": 20}
EARLIER = {10: False, 20: False, 30: True, 40: False, 50: True}
"""Step to whether it was the best. By `RULES` the save of 60, the best, lets go of 30; 10 went before."""


def steps_kept(saved: Mapping[int, bool]) -> set[int]:
    """What `RULES` keep of the steps saved one after the other, step to whether it was the best: the oracle."""
    present: set[int] = set()
    for step in saved:
        present.add(step)
        best = sorted(other for other in present if saved[other])[-2:]
        present = {other for other in present if other == step or other in best or other % 20 == 0}
    return present


def steps_present(directory: Path) -> set[int]:
    return {checkpoint._position(path.name)[0] for path in directory.glob("step-*")}


def check_death_under_rules(code: Code, root: Path) -> int:
    """Dies before each call of a save that deletes by every rule; returns how many calls that were."""
    assert steps_kept(EARLIER) == {20, 30, 40, 50} and steps_kept(EARLIER | {60: True}) == {20, 40, 50, 60}
    prepared = root / "prepared"
    with using(code, Disk()):
        for step, best in EARLIER.items():
            save(code.store(prepared, **RULES)[0], step, step, best=best)
    assert steps_present(prepared) == steps_kept(EARLIER)
    for die_at, loss in ((die_at, loss) for die_at in itertools.count() for loss in LOSSES):
        directory = shutil.copytree(prepared, root / f"{die_at} {loss}")
        with using(code, Disk(die_at=die_at)) as disk, contextlib.suppress(Death):
            save(code.store(directory, **RULES)[0], 60, 60, best=True)
        if disk.died and LOSSES[loss]:
            disk.lose_power(root, is_lost=LOSSES[loss])
        check_state(code, directory, newest={50, 60} if disk.died else {60}, best={50, 60} if disk.died else {60})
        present = steps_present(directory)
        assert {20, 40, 50} <= present <= {20, 30, 40, 50, 60} and (30 in present or 60 in present)
        with using(code, Disk()):
            save(code.store(directory, **RULES)[0], 70, 70)
        assert steps_present(directory) == steps_kept(EARLIER | ({60: True} if 60 in present else {}) | {70: False})
        assert not list(directory.glob(".tmp-*"))
        shutil.rmtree(directory)
        if not disk.died:
            return die_at


def test_a_death_while_deleting_by_any_rule_loses_nothing_that_is_kept(tmp_path):
    assert check_death_under_rules(REAL, tmp_path) > 30


def test_a_death_at_any_call_leaves_a_good_checkpoint(tmp_path):
    assert check_death(REAL, tmp_path) > len(LOSSES) * len(SCENARIOS) * 25


def test_deaths_in_a_row_leave_a_good_checkpoint(tmp_path):
    check_deaths_in_a_row(REAL, tmp_path)


KILLED = """
import mmap, os, random, signal, sys, time
from pathlib import Path
import torch
from dist_cifar.run.checkpoint import CheckpointStore

directory, dice, last = Path(sys.argv[1]), random.Random(2), 0
begun = mmap.mmap(-1, 8)  # shared with the children: the last step whose save began
for kill in range(25):
    child = os.fork()
    if child == 0:
        store = CheckpointStore(directory, keep_last=1)
        for step in range(last + 1, last + 1000):
            tensors = {"model": {"weight": torch.full((50_000,), step)}}
            store.begin_save(step, tensors, {"step": step}, best=step % 2 == 0)
            begun[:] = step.to_bytes(8, "little")
        os._exit(1)
    time.sleep(dice.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    said = []
    store = CheckpointStore(directory, keep_last=1, say=said.append)
    newest, best = store.load_newest(), store.load_best()
    assert not said, said
    if newest is None:
        assert last == 0
        continue
    assert newest.step >= max(last, int.from_bytes(begun[:], "little") - 1) and newest.state == {"step": newest.step}
    assert (newest.tensors["model"]["weight"] == newest.step).all()
    assert (best.step if best else 0) == newest.step // 2 * 2
    last = newest.step
print(last)
"""


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_process_killed_at_any_time_leaves_a_good_checkpoint(tmp_path):
    result = run_script(KILLED, tmp_path / "checkpoints")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


KILLED_AT_EACH_CALL = """
import itertools, os, shutil, signal, sys, threading
from pathlib import Path
import torch
from dist_cifar.run import atomic_io
from dist_cifar.run.checkpoint import CheckpointStore

class Killing:
    def __init__(self, at):
        self.at, self.calls = at, 0
    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in ("open", "write", "fsync", "mkdir", "rmdir", "unlink", "replace"):
            return function
        def call(*arguments):
            assert threading.current_thread().name == "checkpoint"
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls += 1
            return function(*arguments)
        return call

def store(said=None):
    rules = {"keep_last": 1, "keep_best": 2, "keep_every_steps": 20}
    return CheckpointStore(Path(sys.argv[1]), **rules, say=said.append if said is not None else print)

def begin(store, step):
    tensors = {"model": {"weight": torch.full((5000,), step)}}
    store.begin_save(step, tensors, {"step": step}, best=step in (30, 50, 60))

for at in itertools.count():
    earlier = store()
    for step in (10, 20, 30, 40, 50):
        begin(earlier, step)
    earlier.wait()
    kept = {20, 30, 40, 50}
    child = os.fork()
    if child == 0:
        atomic_io.os = Killing(at)
        last = store()
        begin(last, 60)
        last.wait()
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    said = []
    reader = store(said)
    newest, best = reader.load_newest(), reader.load_best()
    assert not said, said
    assert newest.step == best.step and newest.step in ((50, 60) if killed else (60,)), newest.step
    assert newest.state == {"step": newest.step} and (newest.tensors["model"]["weight"] == newest.step).all()
    present = {int(path.name.split("-")[1]) for path in reader.directory.glob("step-*")}
    assert present - {30, 60} == {20, 40, 50}, present
    assert 30 in present or newest.step == 60
    begin(reader, 70)
    reader.wait()
    present = {int(path.name.split("-")[1]) for path in reader.directory.glob("step-*")}
    assert present == {20, 40, 50, 60, 70} - ({60} - {newest.step}) | ({30} if newest.step == 50 else set()), present
    assert not list(reader.directory.glob(".tmp-*"))
    shutil.rmtree(reader.directory)
    if not killed:
        break
print(at)
"""


def test_a_process_killed_at_each_call_of_the_background_write_leaves_a_good_checkpoint(tmp_path):
    result = run_script(KILLED_AT_EACH_CALL, tmp_path / "checkpoints")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30


EXITING = """
import signal, sys, threading
from pathlib import Path
import torch
from dist_cifar.run import checkpoint, atomic_io
{mutation}
class Gate:
    def __getattr__(self, name):
        blocked.set()
        threading.Event().wait()
atomic_io.os, blocked = Gate(), threading.Event()
store = checkpoint.CheckpointStore(Path(sys.argv[1]), keep_last=1)
store.begin_save(20, {{"model": {{"weight": torch.ones(3)}}}}, {{}})
blocked.wait()
signal.alarm({seconds})
"""


NO_DAEMON = """
thread = checkpoint.threading.Thread
checkpoint.threading.Thread = lambda **options: thread(**options | {"daemon": False})
"""


@pytest.mark.parametrize(("mutation", "seconds", "status"), [("", 60, 0), (NO_DAEMON, 1, -14)])
def test_a_write_under_way_does_not_keep_the_process(tmp_path, mutation, seconds, status):
    """Death between the copy and the first call to the disk; a mutant is ended by the alarm (14)."""
    save(REAL.store(tmp_path)[0], 10, 0)
    result = run_script(EXITING.format(mutation=mutation, seconds=seconds), tmp_path)
    assert result.returncode == status, result.stderr
    check_state(REAL, tmp_path, newest={0}, best={None})


# --- disks that are full or cannot be written --------------------------------------------------------------------


def check_full_disk(code: Code, root: Path) -> int:
    """The disk is full from each call on; returns the number of calls tried."""
    for full_at in itertools.count():
        directory = root / str(full_at)
        store, said = code.store(directory, keep_last=2)
        with using(code, Disk()):
            save(store, 10, 0, best=True)
            save(store, 20, 1)
        with using(code, Disk(full_at=full_at)):
            try:
                save(store, 30, 2, best=True)
                break
            except CheckpointError as error:
                assert str(directory) in str(error) and "No space left" in str(error) and "free space" in str(error)
                assert "\n" not in str(error) and error.exit_code == 74
        if "step-00000030" not in names(directory):
            assert names(directory) == {"step-00000010", "step-00000020", "latest", "best"}
        else:  # then an interrupted deletion of the old best may have left a part
            assert "step-00000020" in names(directory)
        check_state(code, directory, newest={1, 2}, best={0, 2})
        with using(code, Disk()):
            save(store, 30, 3)
        assert mark_of(store.load_newest()) == 3 and said == []
    return full_at


def check_warning(code: Code, root: Path) -> None:
    """`on_write_error="warn"`: the disk is full from each call on, the training goes on and can save again later."""
    for full_at in itertools.count():
        directory = root / f"warned {full_at}"
        store, said = code.store(directory, keep_last=2, on_write_error="warn")
        with using(code, Disk()):
            save(store, 10, 0, best=True)
            save(store, 20, 1)
        with using(code, Disk(full_at=full_at)):
            store.begin_save(30, tensors_of(2), {"mark": 2}, best=True)
            store.wait()
            if not said:
                store.wait(must_succeed=True)
                break
            assert len(said) == 1 and "\n" not in said[0] and "on_write_error=warn" in said[0]
            assert str(directory) in said[0] and "No space left" in said[0] and "free space" in said[0]
            assert not store.failed
            for _ in range(2):
                with pytest.raises(CheckpointError, match="cannot save step 30") as caught:
                    store.wait(must_succeed=True)
                assert caught.value.exit_code == 74
        if "step-00000030" not in names(directory):
            assert names(directory) == {"step-00000010", "step-00000020", "latest", "best"}
        check_state(code, directory, newest={1, 2}, best={0, 2})
        with using(code, Disk()):
            save(store, 40, 3)
            store.wait(must_succeed=True)
        assert mark_of(store.load_newest()) == 3 and len(said) == 1
    assert full_at > 20 or code is not REAL


def test_a_full_disk_can_be_a_warning(tmp_path):
    check_warning(REAL, tmp_path)


def test_a_disk_full_at_any_call_is_an_error_and_loses_nothing(tmp_path):
    assert check_full_disk(REAL, tmp_path) > 20


def test_a_disk_that_turns_read_only_at_any_call_is_an_error_and_loses_nothing(tmp_path):
    for broken_at in itertools.count():
        directory = tmp_path / str(broken_at)
        store, said = REAL.store(directory)
        with using(REAL, Disk()):
            save(store, 10, 0)
        with using(REAL, Disk(broken_at=broken_at)):
            try:
                save(store, 20, 1)
                break
            except CheckpointError as error:
                assert "Read-only file system" in str(error) and "writable" in str(error)
        check_state(REAL, directory, newest={0, 1}, best={None})
        with using(REAL, Disk()):
            save(store, 20, 2)
        assert names(directory) in ({"latest", "step-00000020"}, {"latest", "step-00000020-2"})
        assert mark_of(store.load_newest()) == 2 and said == []
    assert broken_at > 20


def test_a_full_file_system(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system; the injected errors test the same")
    try:
        store, said = REAL.store(tmp_path / "checkpoints")
        save(store, 10, 0)
        big = {"model": {"weight": torch.zeros(100_000)}}
        store.begin_save(20, big, {})
        with pytest.raises(CheckpointError, match=r"step 20 \(0\.4 MB needed, 0\.\d MB free\): .*No space left"):
            store.wait()
        assert names(store.directory) == {"step-00000010", "latest"}
        assert mark_of(store.load_newest()) == 0 and said == []
        save(store, 20, 1)
        assert mark_of(store.load_newest()) == 1
        remount = ["mount", "-o", "remount,ro", tmp_path]
        subprocess.run(remount, check=True)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            save(store, 30, 2)
        warning, said = REAL.store(store.directory, on_write_error="warn")
        warning.begin_save(30, tensors_of(2), {"mark": 2})
        warning.wait()
        assert len(said) == 1 and "Read-only file system" in said[0]
        assert mark_of(warning.load_newest()) == 1
        subprocess.run([*remount[:2], "remount,rw", tmp_path], check=True)
        save(warning, 30, 2)
        assert names(store.directory) == {"step-00000030", "latest"} and len(said) == 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    store, _ = REAL.store(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="checkpoints"):
        save(store, 1, 0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.load_newest()


def test_a_defect_of_the_caller_is_not_taken_for_a_full_disk(tmp_path):
    store, _ = REAL.store(tmp_path)
    with pytest.raises(TypeError):
        store.begin_save(1, tensors_of(0), {"not JSON": object()})
    with pytest.raises(KeyError, match="complex64"):
        store.begin_save(1, {"model": {"weight": torch.zeros(1, dtype=torch.complex64)}}, {})
    assert names(tmp_path) == set()
    assert store.load_newest() is None


# --- damage ------------------------------------------------------------------------------------------------------


def saved_twice(code: Code, root: Path) -> tuple[Path, Path]:
    """The directory, and the newest checkpoint in it: mark 1, the best; mark 0 was the best before it."""
    directory = root / "checkpoints"
    store, _ = code.store(directory, keep_last=2)
    with using(code, Disk()):
        save(store, 10, 0, best=True)
        return directory, save(store, 20, 1, best=True)


def check_falls_back(code: Code, directory: Path, damaged: Path) -> None:
    """The damaged newest checkpoint is not loaded, the one before it is, and this is said."""
    with pytest.raises(CheckpointError, match="step-00000020"):
        code.checkpoint.read_checkpoint(damaged)
    for load in ("load_newest", "load_best"):
        store, said = code.store(directory)
        assert mark_of(getattr(store, load)()) == 0
        assert len(said) == 2 and "passed over" in said[0] and damaged.name in said[0] and "10" in said[1]


def check_bit_flips(code: Code, root: Path) -> None:
    """One bit of every byte of every file."""
    directory, newest = saved_twice(code, root)
    for name in os.listdir(newest):
        whole = (newest / name).read_bytes()
        for position in range(len(whole)):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            (newest / name).write_bytes(flipped)
            check_falls_back(code, directory, newest)
        (newest / name).write_bytes(whole)
    assert mark_of(code.store(directory)[0].load_newest()) == 1


def check_missing_and_extra_files(code: Code, root: Path) -> None:
    directory, newest = saved_twice(code, root)
    for name in os.listdir(newest):
        (newest / name).rename(root / "aside")
        check_falls_back(code, directory, newest)
        (root / "aside").rename(newest / name)
    for extra in ("model2.safetensors", "pickle.bin", ".hidden"):
        (newest / extra).write_bytes(b"")
        check_falls_back(code, directory, newest)
        (newest / extra).unlink()
    assert mark_of(code.store(directory)[0].load_newest()) == 1


def benchmark(name: str) -> ModuleType:
    """A script of `benchmarks/`, imported."""
    path = REPOSITORY / "benchmarks/suite" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


damage = benchmark("checkpoint_damage")


def check_random_damage(code: Code, root: Path) -> None:
    """Some of each kind; benchmarks/suite/checkpoint_damage.py shoots more, at checkpoints of a real model."""
    dice = random.Random(3)
    targets = damage.Range(code.checkpoint, root, lambda step: (tensors_of(step), {"mark": step}))
    for kind in [*damage.KINDS] * 20:
        assert targets.shoot(kind, dice) == damage.Verdict(detected=True, fell_back=True), kind


def test_a_flipped_bit_in_any_byte_is_found(tmp_path):
    check_bit_flips(REAL, tmp_path)


def test_missing_and_extra_files_are_found(tmp_path):
    check_missing_and_extra_files(REAL, tmp_path)


def test_random_damage_is_found(tmp_path):
    check_random_damage(REAL, tmp_path)


def test_what_parses_by_its_own_hash_is_still_checked(tmp_path):
    _, newest = saved_twice(REAL, tmp_path)
    manifest = checkpoint._read_manifest(newest)
    (newest / "manifest.json").write_bytes(checkpoint._seal({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        read_checkpoint(newest)
    (newest / "manifest.json").write_bytes(checkpoint._seal({**manifest, "step": 30}))
    with pytest.raises(CheckpointError, match="step 30"):
        read_checkpoint(newest)
    for name in manifest["files"]:
        manifest["files"][name] |= {"bytes": 3, "sha256": checkpoint.hashlib.sha256(b"odd").hexdigest()}
        (newest / name).write_bytes(b"odd")
    (newest / "manifest.json").write_bytes(checkpoint._seal(manifest))
    with pytest.raises(CheckpointError, match="not what it should be"):
        read_checkpoint(newest)


@pytest.mark.parametrize("content", [None, "", "step-00000010\n", "step-99999999\n", "\0\xff ../..\n"])
def test_latest_and_best_are_not_needed(tmp_path, content):
    directory, _ = saved_twice(REAL, tmp_path)
    for name in ("latest", "best"):
        assert (directory / name).read_text() == "step-00000020\n"
        (directory / name).unlink() if content is None else (directory / name).write_text(content)
    check_state(REAL, directory, newest={1}, best={1})
    save(REAL.store(directory)[0], 30, 2, best=True)
    assert {(directory / name).read_text() for name in ("latest", "best")} == {"step-00000030\n"}


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_nothing_is_started_over_when_all_are_bad(tmp_path, name, damage):
    directory, newest = saved_twice(REAL, tmp_path)
    for path in (directory / "step-00000010", newest):
        damage(path / name)
    store, said = REAL.store(directory)
    with pytest.raises(CheckpointError, match=r"step-00000020.*step-00000010.*Restore one.*move the directory away"):
        store.load_newest()
    assert len(said) == 2


def test_nothing_saved_is_no_error(tmp_path):
    store, said = REAL.store(tmp_path / "checkpoints")
    assert store.load_newest() is None and store.load_best() is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".tmp-step-00000001-0a1b2c3d").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert store.load_newest() is None and said == []
    save(store, 1, 0)
    assert names(store.directory) == {"latest", "notes.txt", "step-00000001"}


# --- what is kept ------------------------------------------------------------------------------------------------


def check_retention(code: Code, root: Path) -> None:
    store, said = code.store(root / "checkpoints", keep_last=2)
    for mark, best in enumerate([False, True, False, False, False, True, False]):
        path = save(store, mark, mark, best=best)
        newest = {f"step-{step:08d}" for step in range(max(0, mark - 1), mark + 1)}
        kept_best = {"step-00000005"} if mark >= 5 else {"step-00000001"} if mark >= 1 else set()
        assert {name for name in names(store.directory) if name.startswith("step-")} == newest | kept_best
        assert (store.directory / "latest").read_text().strip() == path.name
        check_state(code, store.directory, newest={mark}, best={5 if mark >= 5 else 1 if mark >= 1 else None})
    assert said == []


def check_fallback_is_not_pushed_out(code: Code, root: Path) -> None:
    """A damaged checkpoint of a later step takes no place of the good ones that are saved after the fallback."""
    store, _ = code.store(root / "checkpoints", keep_last=2)
    for mark, step in enumerate((10, 20, 30)):
        save(store, step, mark)
    (store.directory / "step-00000030" / "state.json").unlink()
    assert mark_of(store.load_newest()) == 1
    save(store, 25, 3)
    assert {"step-00000020", "step-00000025", "step-00000030"} <= names(store.directory)
    assert mark_of(code.store(store.directory)[0].load_newest()) == 3
    save(store, 35, 4)
    assert names(store.directory) == {"step-00000025", "step-00000035", "latest"}
    check_state(code, store.directory, newest={4}, best={None})


def check_damaged_step_saved_again(code: Code, root: Path) -> None:
    store, _ = code.store(root / "checkpoints", keep_last=2)
    for mark, step in enumerate((10, 20)):
        save(store, step, mark)
    (store.directory / "step-00000020" / "state.json").unlink()
    assert mark_of(store.load_newest()) == 0
    save(store, 20, 2)
    assert names(store.directory) == {"step-00000010", "step-00000020-2", "latest"}
    check_state(code, store.directory, newest={2}, best={None})


def check_name_of_a_damaged_one(code: Code, root: Path) -> None:
    """A checkpoint that takes the name of a damaged one, which somebody has removed, is not taken for it."""
    store, _ = code.store(root / "checkpoints")
    damaged = save(store, 10, 0)
    (damaged / "state.json").unlink()
    with pytest.raises(CheckpointError):
        store.load_newest()
    shutil.rmtree(damaged)
    assert save(store, 10, 1) == damaged
    check_state(code, store.directory, newest={1}, best={None})


def test_the_newest_and_the_best_are_kept(tmp_path):
    check_retention(REAL, tmp_path)


def test_a_fallback_is_not_pushed_out(tmp_path):
    check_fallback_is_not_pushed_out(REAL, tmp_path)


def test_a_damaged_step_is_saved_again(tmp_path):
    check_damaged_step_saved_again(REAL, tmp_path)


def test_the_name_of_a_damaged_checkpoint_is_free_again(tmp_path):
    check_name_of_a_damaged_one(REAL, tmp_path)


def test_the_best_of_a_step_outlives_a_second_save_of_the_step(tmp_path):
    store, said = REAL.store(tmp_path)
    save(store, 10, 0, best=True)
    save(store, 10, 1)
    save(store, 10, 2)
    assert names(tmp_path) == {"step-00000010", "step-00000010-3", "latest", "best"}
    assert mark_of(store.load_newest()) == 2 and mark_of(store.load_best()) == 0 and said == []


def test_of_a_linked_checkpoint_only_the_link_is_deleted(tmp_path):
    store, _ = REAL.store(tmp_path / "checkpoints")
    path = save(store, 10, 0)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert mark_of(store.load_newest()) == 0
    save(store, 20, 1)
    assert names(store.directory) == {"step-00000020", "latest"}
    assert mark_of(read_checkpoint(tmp_path / "elsewhere")) == 0


def check_rules(code: Code, root: Path) -> None:
    """Many saves, each rule in the way of the others, against the oracle."""
    dice = random.Random(4)
    saved: dict[int, bool] = {}
    store, said = code.store(root / "rules", **RULES)
    for step in range(0, 300, 5):
        saved[step] = dice.random() < 0.4
        save(store, step, step, best=saved[step])
        assert steps_present(store.directory) == steps_kept(saved)
    assert said == []


def check_kept_best_are_steps(code: Code, root: Path) -> None:
    """The best of a step that was saved twice is one of the best that are kept, not two."""
    store, _ = code.store(root / "checkpoints", keep_best=2)
    for mark, (step, best) in enumerate([(10, True), (20, True), (20, True), (30, False)]):
        save(store, step, mark, best=best)
    assert names(store.directory) == {"step-00000010", "step-00000020-2", "step-00000030", "latest", "best"}


def check_clock(code: Code, root: Path) -> None:
    """The clock was set back between saves, or forward: what is newer is told by the step."""
    store, said = code.store(root / "checkpoints", keep_last=3)
    for mark in range(5):
        path = save(store, 10 * mark, mark, best=mark in (1, 3))
        for file in (path, *path.iterdir(), store.directory / "latest"):
            os.utime(file, (10**9 - 10**6 * mark,) * 2)
        check_state(code, store.directory, newest={mark}, best={3 if mark >= 3 else 1 if mark else None})
    assert steps_present(store.directory) == {20, 30, 40} and said == []


def test_every_rule_keeps_its_own(tmp_path):
    check_rules(REAL, tmp_path)


def test_the_best_are_counted_by_steps(tmp_path):
    check_kept_best_are_steps(REAL, tmp_path)


def test_no_clock_decides(tmp_path):
    check_clock(REAL, tmp_path)


# --- the thread that writes --------------------------------------------------------------------------------------


class Gate(Disk):
    """A disk whose first call waits until the gate is opened; the caller of `begin_save` must never wait for it."""

    def __init__(self, **faults: int) -> None:
        super().__init__(**faults)
        self.reached, self.opened = threading.Event(), threading.Event()

    def _call(self, grows: bool = False) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.reached.set()
        self.opened.wait()
        super()._call(grows)


def check_own_copy(code: Code, root: Path) -> None:
    """`begin_save` returns before the disk is asked for anything, and what the caller changes then is not saved."""
    store, _ = code.store(root / "checkpoints")
    weight = torch.randn(4, 3)
    cl = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    expected = {"weight": weight.clone(), "channels_last": cl.clone()}
    tensors, state = {"model": {"weight": weight, "channels_last": cl}}, {"progress": {"step": 1}}
    with using(code, Gate()) as gate:
        store.begin_save(1, tensors, state)
        try:
            assert not store.failed and names(store.directory) == set()
            weight.zero_()
            cl.add_(1)
            state["progress"]["step"] = 2
            tensors["model"]["late"] = torch.ones(1)
        finally:
            gate.opened.set()
        store.wait()
    loaded = store.load_newest()
    assert loaded.state == {"progress": {"step": 1}}
    assert weights_sha256(loaded.tensors["model"]) == weights_sha256(expected)


class Late(Mapping):
    """A mapping that notes what is on the disk when it is first read."""

    def __init__(self, content: Mapping[str, Any], directory: Path) -> None:
        self._content, self._directory, self.seen = content, directory, None

    def __getitem__(self, key):
        return self._content[key]

    def __len__(self) -> int:
        return len(self._content)

    def __iter__(self):
        if self.seen is None:
            self.seen = names(self._directory)
        return iter(self._content)


def check_next_save_waits(code: Code, root: Path) -> None:
    """The second save copies nothing before the first is on the disk: one copy at a time, one writer at a time."""

    class Opening(code.checkpoint.CheckpointStore):
        def wait(self, **options: bool) -> None:
            gate.opened.set()  # only now: who does not wait finds the first save still at the gate
            super().wait(**options)

    for call in ("begin_save", "load_newest", "load_best"):
        with using(code, Gate()) as gate:
            store = code.checkpoint.CheckpointStore(root / call, keep_last=2)
            store.begin_save(10, tensors_of(0), {"mark": 0}, best=True)
            gate.reached.wait()
            store.__class__ = Opening
            tensors = Late(tensors_of(1), store.directory)
            try:
                if call == "begin_save":
                    store.begin_save(20, tensors, {"mark": 1})
                    assert tensors.seen == {"step-00000010", "latest", "best"}
                else:
                    assert mark_of(getattr(store, call)()) == 0
            finally:
                gate.opened.set()
            store.wait()
        assert mark_of(store.load_newest()) == (1 if call == "begin_save" else 0)


NEXT_CALLS: dict[str, Callable[[CheckpointStore], Any]] = {
    "begin_save": lambda store: store.begin_save(30, tensors_of(2), {"mark": 2}),
    "wait": lambda store: store.wait(),
    "wait for success": lambda store: store.wait(must_succeed=True),
    "load_newest": lambda store: store.load_newest(),
    "load_best": lambda store: store.load_best(),
}


class Defect(Disk):
    """A disk with a bug."""

    def _call(self, grows: bool = False) -> None:
        raise ZeroDivisionError("a bug")


def check_failure_surfaces(code: Code, root: Path) -> None:
    """What went wrong in the thread is raised by the next call, whichever it is, once, and `failed` tells it before."""
    cases = [
        (Disk(full_at=0), CheckpointError, "raise"),
        *[(Defect(), ZeroDivisionError, p) for p in ("raise", "warn")],
    ]
    for (number, (disk, error, policy)), (name, call) in itertools.product(enumerate(cases), NEXT_CALLS.items()):
        store, said = code.store(root / f"{number} {name}", on_write_error=policy)
        save(store, 10, 0, best=True)
        assert not store.failed
        with using(code, disk):
            store.begin_save(20, tensors_of(1), {"mark": 1})
            store._thread.join()
        assert store.failed
        with pytest.raises(error):
            call(store)
        assert not store.failed
        store.wait()
        with pytest.raises(error):
            store.wait(must_succeed=True)
        assert mark_of(store.load_newest()) == 0 and said == []
        save(store, 30, 2)
        store.wait(must_succeed=True)
        assert mark_of(store.load_newest()) == 2 and not store.failed


def check_memory(code: Code, root: Path) -> None:
    """A save takes the memory of one copy, and gives it back, also when it fails under the policy `warn`."""
    tensors = {"model": {"a": torch.randn(1000, 1000)}, "optimizer": {"a": torch.randn(1000, 1000), "b": torch.ones(3)}}
    store, _ = code.store(root / "checkpoints", on_write_error="warn")
    tracemalloc.start()
    try:
        for step, disk in enumerate((os, Disk(full_at=0), os)):
            with using(code, disk):
                before = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
                store.begin_save(step, tensors, {})
                store.wait()
                after, peak = tracemalloc.get_traced_memory()
            assert 8e6 < peak - before < 9e6 and after - before < 1e6
    finally:
        tracemalloc.stop()


class SlowDisk(Gate):
    """Every call takes ten seconds of a clock of its own, which stands in for `time`."""

    def __init__(self, **faults: int) -> None:
        super().__init__(**faults)
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def _call(self, grows: bool = False) -> None:
        super()._call(grows)
        self.now += 10.0


def check_write_seconds(code: Code, root: Path) -> None:
    """The time of the last write, whether it succeeded or not, and of one that is under way."""
    store, _ = code.store(root / "checkpoints")
    assert store.write_seconds == 0.0
    with using(code, SlowDisk()) as disk:
        code.checkpoint.time = disk
        try:
            store.begin_save(10, tensors_of(0), {"mark": 0})
            disk.reached.wait()
            disk.now += 7.0
            assert store.write_seconds == 7.0
            disk.opened.set()
            store.wait()
            first = store.write_seconds
            assert first == disk.now - 1000.0 > 100.0
            disk.now += 5000.0
            assert store.write_seconds == first  # the time between two writes is nobody's
            disk.opened.clear()
            disk.reached.clear()
            began = disk.now
            store.begin_save(20, tensors_of(1), {"mark": 1})
            disk.reached.wait()
            assert store.write_seconds == first  # not yet as long
            disk.now += first + 3.0
            assert store.write_seconds == first + 3.0
            disk.opened.set()
            store.wait()
            assert store.write_seconds == disk.now - began
        finally:
            disk.opened.set()
            code.checkpoint.time = time
    with using(code, SlowDisk(full_at=3)) as disk:
        code.checkpoint.time = disk
        try:
            disk.opened.set()
            store.begin_save(30, tensors_of(2), {"mark": 2})
            with pytest.raises(CheckpointError):
                store.wait()
            assert store.write_seconds == disk.now - 1000.0 > 0.0
        finally:
            code.checkpoint.time = time


def test_the_store_knows_how_long_a_write_takes(tmp_path):
    check_write_seconds(REAL, tmp_path)


def test_what_is_saved_is_a_copy_of_its_own(tmp_path):
    check_own_copy(REAL, tmp_path)


def test_the_next_save_waits_for_the_one_before(tmp_path):
    check_next_save_waits(REAL, tmp_path)


def test_a_failure_in_the_thread_is_raised_by_the_next_call_once(tmp_path):
    check_failure_surfaces(REAL, tmp_path)


def test_a_line_that_cannot_be_said_is_no_silence(tmp_path):
    def say(line: str) -> None:
        raise BrokenPipeError(line)

    store = CheckpointStore(tmp_path, keep_last=1, on_write_error="warn", say=say)
    with using(REAL, Disk(full_at=0)):
        store.begin_save(10, tensors_of(0), {})
        with pytest.raises(BrokenPipeError, match="No space left"):
            store.wait()


def test_one_copy_in_memory(tmp_path):
    check_memory(REAL, tmp_path)


# --- values ------------------------------------------------------------------------------------------------------


def test_every_bit_returns(tmp_path):
    base = torch.randn(2, 3, 4, 5)
    model = {
        "fp32": base,
        "special": torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, 1e-45]),
        "nan payload": torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32),
        "bf16": torch.randn(7).bfloat16(),
        "fp16": torch.randn(7).half(),
        "int32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
        "int16": torch.tensor([-(2**15), 2**15 - 1], dtype=torch.int16),
        "int8": torch.tensor([-128, 127, 1], dtype=torch.int8),
        "fp64": torch.randn(7, dtype=torch.float64),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "uint8": torch.arange(256).to(torch.uint8),
        "bool": torch.tensor([True, False]),
        "0-dim": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(1, 2),
        "same storage": base,
        "part of it": base[1, 1:],
        "expanded": torch.randn(3, 1).expand(3, 5),
        'name with "quotes", ü': torch.randn(2),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    before = weights_sha256(model)
    state = {"lr": 0.1 + 0.2, "best": -math.inf, "worst": math.inf, "tiny": 5e-324, "epoch": 3, "é": ["a", None, True]}
    store, _ = REAL.store(tmp_path)
    assert {tensor.dtype for tensor in model.values()} == checkpoint.DTYPES.keys()
    store.begin_save(7, {"model": model, "empty": {}}, {**state, "nan": math.nan})
    assert weights_sha256(model) == before
    loaded = store.load_newest()
    assert (loaded.step, loaded.path) == (7, tmp_path / "step-00000007")
    assert loaded.tensors["empty"] == {}
    assert loaded.tensors["model"].keys() == model.keys()
    assert weights_sha256(loaded.tensors["model"]) == before
    for name, tensor in loaded.tensors["model"].items():
        assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (model[name].dtype, model[name].shape, True)
    assert math.isnan(loaded.state.pop("nan"))
    assert loaded.state == state
    loaded.tensors["model"]["fp32"].zero_()  # it is the caller's own
    assert loaded.tensors["model"]["same storage"].any()


def test_the_digest_of_weights_sees_every_change_and_no_layout():
    weights = {"a": torch.randn(2, 3, 4, 4), "b": torch.arange(4), "c": torch.tensor(1.5)}
    digest = weights_sha256(weights)
    assert digest == weights_sha256(dict(reversed(weights.items())))
    assert digest == weights_sha256({**weights, "a": weights["a"].contiguous(memory_format=torch.channels_last)})
    assert digest == weights_sha256({**weights, "a": torch.nn.Parameter(weights["a"])})
    flipped = weights["a"].clone()
    flipped.view(torch.int32).view(-1)[77] ^= 1
    changes = [
        {"a": flipped},
        {"a": weights["a"].reshape(2, 3, 16)},
        {"a": weights["a"].view(torch.int32)},
        {"b": weights["b"].to(torch.int32)},
        {"b": weights["b"].to(torch.float64)},
        {"c": torch.tensor([1.5])},
        {"c": torch.tensor(-1.5)},
        {"d": torch.empty(0)},
    ]
    digests = {weights_sha256({**weights, **change}) for change in changes}
    renamed = {"e" if name == "c" else name: tensor for name, tensor in weights.items()}
    swapped = {**weights, "b": weights["c"], "c": weights["b"]}
    digests |= {digest, weights_sha256(renamed), weights_sha256(swapped)}
    assert len(digests) == len(changes) + 3


# --- the primitives ----------------------------------------------------------------------------------------------


def check_write_atomic(code: Code, root: Path) -> int:
    """The old content or the new, whenever the process dies; the new once it has returned."""
    path = root / "file"
    for die_at in itertools.count():
        with using(code, Disk()):
            code.files.write_atomic(path, "old")
        with using(code, Disk(die_at=die_at)) as disk, contextlib.suppress(Death):
            code.files.write_atomic(path, b"new content")
        disk.lose_power(root, is_lost=lambda: True)
        assert path.read_bytes() in ({b"old", b"new content"} if disk.died else {b"new content"})
        if not disk.died:
            return die_at


def test_write_atomic(tmp_path):
    assert check_write_atomic(REAL, tmp_path) == 5  # open, write, fsync, rename, fsync of the directory
    assert names(tmp_path) == {"file"}
    atomic_io.write_atomic(tmp_path / "file", "ü")
    assert (tmp_path / "file").read_bytes() == "ü".encode()
    with using(REAL, Disk(full_at=1)), pytest.raises(OSError, match="No space"):
        atomic_io.write_atomic(tmp_path / "file", "x")
    assert names(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "ü"


def test_a_write_may_be_short(tmp_path, monkeypatch):
    disk = Disk()
    disk.write = lambda descriptor, data: os.write(descriptor, data[:7])
    with using(REAL, disk):
        atomic_io.write_file(tmp_path / "file", bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


def test_a_file_system_without_directory_syncs(tmp_path):
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    disk = Disk()
    disk.fsync = fsync
    with using(REAL, disk):
        number = errno.EINVAL
        atomic_io.fsync_dir(tmp_path)
        number = errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            atomic_io.fsync_dir(tmp_path)


# --- mutants -----------------------------------------------------------------------------------------------------


def mutant(module: str, old: str, new: str) -> Code:
    """The code with one passage replaced."""
    modules = {}
    for name, real in (("files", files), ("checkpoint", checkpoint)):
        source = Path(real.__file__).read_text(encoding="utf-8")
        if name == module:
            assert source.count(old) == 1, f"the passage occurs {source.count(old)} times: {old}"
            source = source.replace(old, new)
        modules[name] = ModuleType(real.__name__)
        exec(compile(source, f"mutant of {real.__file__}", "exec"), modules[name].__dict__)
    modules["checkpoint"].files = modules["files"]
    return Code(**modules)


WRITE_MANIFEST = "            atomic_io.write_file(temporary / MANIFEST, _seal(manifest))\n"
FSYNC_TEMPORARY = "            atomic_io.fsync_dir(temporary)\n"
MOVE = "            atomic_io.move(temporary, path)\n"

COPY_STATE = """        contents = {STATE: memoryview((json.dumps(dict(state), indent=1) + "\\n").encode())}
"""
COPY_TENSORS = """        contents |= {stem + SUFFIX: _safetensors(group) for stem, group in tensors.items()}
"""
LATE = """
        class Late(dict):
            def items(self):
                yield from super().items()
                yield from {late}.items()
        contents = Late({now})
"""
LATE_COPY_OF_STATE = LATE.format(late="{STATE: json.dumps(dict(state)).encode()}", now="{}")
LATE_COPY_OF_TENSORS = LATE.format(
    late="{stem + SUFFIX: _safetensors(group) for stem, group in tensors.items()}", now="contents"
)

MUTANTS = {
    "renamed before the manifest": (
        check_death,
        "checkpoint",
        WRITE_MANIFEST + FSYNC_TEMPORARY + MOVE,
        MOVE
        + "            atomic_io.write_file(path / MANIFEST, _seal(manifest))\n            atomic_io.fsync_dir(path)\n",
    ),
    "written in place": (
        check_death,
        "checkpoint",
        "        temporary = self._temporary(path)\n        try:",
        "        temporary = path\n        try:",
    ),
    "manifest deleted last": (
        check_death,
        "checkpoint",
        "        atomic_io.move(path, temporary)\n        atomic_io.remove_tree(temporary)\n",
        "        for name in sorted(os.listdir(path), key=MANIFEST.__eq__):\n"
        "            atomic_io.remove_tree(path / name)\n        atomic_io.remove_tree(path)\n",
    ),
    "same step deleted before it is saved again": (
        check_death,
        "checkpoint",
        "        path = self._free_path(step)\n",
        '        path = self.directory / f"step-{step:08d}"\n'
        "        if path.exists():\n            self._delete(path)\n",
    ),
    "old ones deleted first": (
        check_death,
        "checkpoint",
        "        path = self._write(step, contents, best)\n",
        "        for path in self._paths():\n            self._delete(path)\n"
        "        path = self._write(step, contents, best)\n",
    ),
    "nothing swept": (check_death, "checkpoint", "        self._sweep()\n", ""),
    "too much swept": (check_deaths_in_a_row, "checkpoint", '.glob(".tmp-*")', '.glob("*")'),
    "content not synced": (check_death, "files", "        os.fsync(descriptor)\n    finally", "    finally"),
    "names of the files not synced": (check_death, "checkpoint", FSYNC_TEMPORARY, ""),
    "rename not synced": (check_death, "files", "    fsync_dir(new.parent)\n", ""),
    "rename not synced in write_atomic": (check_write_atomic, "files", "    fsync_dir(new.parent)\n", ""),
    "overwritten in place": (
        check_write_atomic,
        "files",
        'path.with_name(f".tmp-{path.name}{writer}")',
        "path",
    ),
    "temporaries of a failure left": (
        check_full_disk,
        "checkpoint",
        "                atomic_io.remove_tree(temporary)\n",
        "                pass\n",
    ),
    "a full disk not caught": (
        check_full_disk,
        "checkpoint",
        "except (OSError, CheckpointError) as error:",
        "except KeyError as error:",
    ),
    "hashes not compared": (
        check_bit_flips,
        "checkpoint",
        'if hashlib.sha256(data).hexdigest() != entry["sha256"]:',
        "if False:",
    ),
    "hashes not compared, random damage": (
        check_random_damage,
        "checkpoint",
        'if hashlib.sha256(data).hexdigest() != entry["sha256"]:',
        "if False:",
    ),
    "no fallback, random damage": (
        check_random_damage,
        "checkpoint",
        "                continue\n",
        "                raise\n",
    ),
    "manifest not sealed": (check_bit_flips, "checkpoint", "if sealed != data:", "if sealed is None:"),
    "extra files let pass": (
        check_missing_and_extra_files,
        "checkpoint",
        "set(entries).symmetric_difference(os.listdir(path))",
        "set(entries).difference(os.listdir(path))",
    ),
    "no fallback": (check_bit_flips, "checkpoint", "                continue\n", "                raise\n"),
    "fallback not said": (
        check_bit_flips,
        "checkpoint",
        '                self._say(f"damaged checkpoint passed over: {error}")\n',
        "",
    ),
    "oldest loaded first": (check_retention, "checkpoint", "key=_position, reverse=True)", "key=_position)"),
    "best not kept": (check_retention, "checkpoint", "[: self._keep_best]", "[:0]"),
    "every best kept": (check_retention, "checkpoint", "[: self._keep_best]", ""),
    "one kept too few": (check_retention, "checkpoint", "[: self._keep_last]", "[: self._keep_last - 1]"),
    "later steps count as kept": (
        check_fallback_is_not_pushed_out,
        "checkpoint",
        "if _position(path.name) <= _position(saved.name)]",
        "]",
    ),
    "order from the clock": (
        check_clock,
        "checkpoint",
        "sorted(names, key=_position, reverse=True)",
        "sorted(names, key=lambda name: os.stat(self.directory / name).st_mtime, reverse=True)",
    ),
    "the oldest best kept": (
        check_rules,
        "checkpoint",
        "list(best.values())[: self._keep_best]",
        "list(best.values())[-self._keep_best :]",
    ),
    "multiples deleted": (check_rules, "checkpoint", "if step % self._keep_every_steps == 0", "if False"),
    "multiples deleted while dying": (
        check_death_under_rules,
        "checkpoint",
        "if step % self._keep_every_steps == 0",
        "if step % self._keep_every_steps == 0 and step == _position(saved.name)[0]",
    ),
    "the best counted by directories": (
        check_kept_best_are_steps,
        "checkpoint",
        "best = _by_step(good), _by_step(path for path in good if _says_best(path))",
        "best = _by_step(good), {path: path for path in good if _says_best(path)}",
    ),
    "no copy of the tensors": (check_own_copy, "checkpoint", COPY_TENSORS, LATE_COPY_OF_TENSORS),
    "no copy of the state": (check_own_copy, "checkpoint", COPY_STATE, LATE_COPY_OF_STATE),
    "written by the caller": (check_own_copy, "checkpoint", "        thread.start()\n", "        thread.run()\n"),
    "the next save does not wait": (
        check_next_save_waits,
        "checkpoint",
        "        self.wait()\n        self._failure = None\n",
        "        self._failure = None\n",
    ),
    "the next save waits with a copy in its hand": (
        check_next_save_waits,
        "checkpoint",
        "        self.wait()\n        self._failure = None\n",
        "        copy = {stem: _safetensors(group) for stem, group in tensors.items()}\n"
        "        self.wait()\n        self._failure = None\n",
    ),
    "load_newest does not wait": (
        check_next_save_waits,
        "checkpoint",
        "        self.wait()\n        return self._load",
        "        return self._load",
    ),
    "load_best does not wait": (
        check_next_save_waits,
        "checkpoint",
        "        self.wait()\n        candidates",
        "        candidates",
    ),
    "a defect vanishes": (
        check_failure_surfaces,
        "checkpoint",
        "            self._failure = self._unraised = error\n",
        "            self._failure = self._unraised = error if isinstance(error, CheckpointError) else None\n",
    ),
    "raised twice": (check_failure_surfaces, "checkpoint", "        self._unraised = None\n", ""),
    "failed is never told": (check_failure_surfaces, "checkpoint", "return self._unraised is not None", "return False"),
    "a failure is forgotten": (
        check_failure_surfaces,
        "checkpoint",
        "error = self._failure if must_succeed else self._unraised",
        "error = self._unraised",
    ),
    "a failure sticks": (
        check_failure_surfaces,
        "checkpoint",
        "        self._failure = None\n        contents",
        "        contents",
    ),
    "the write is not timed": (
        check_write_seconds,
        "checkpoint",
        "self._write_seconds, self._began = time.monotonic() - began, None",
        "self._began = None",
    ),
    "the write under way does not count": (
        check_write_seconds,
        "checkpoint",
        "return max(self._write_seconds, under_way)",
        "return self._write_seconds",
    ),
    "the longest write counts for ever": (
        check_write_seconds,
        "checkpoint",
        "self._write_seconds, self._began = time.monotonic() - began, None",
        "self._write_seconds, self._began = max(self._write_seconds, time.monotonic() - began), None",
    ),
    "warned and raised": (check_warning, "checkpoint", 'if self._on_write_error == "raise":', "if True:"),
    "not warned": (
        check_warning,
        "checkpoint",
        '                self._say(f"checkpoint.on_write_error=warn: {self._failure}")\n',
        "",
    ),
    "two copies": (check_memory, "checkpoint", "memoryview(content)", "memoryview(content.tobytes())"),
    "a name used twice": (
        check_damaged_step_saved_again,
        "checkpoint",
        "max(revisions, default=0) + 1",
        "max(revisions, default=1)",
    ),
    "a name damaged for ever": (
        check_name_of_a_damaged_one,
        "checkpoint",
        "        self._bad.discard(path.name)\n        return path\n",
        "        return path\n",
    ),
    "damaged ones count as kept": (
        check_fallback_is_not_pushed_out,
        "checkpoint",
        "if path.name not in self._bad]",
        "]",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(tmp_path, name):
    check, module, old, new = MUTANTS[name]
    with pytest.raises((AssertionError, CheckpointError, OSError, ZeroDivisionError, pytest.fail.Exception)):
        check(mutant(module, old, new), tmp_path)


def test_a_mutant_that_changes_nothing_passes(tmp_path):
    code = mutant("checkpoint", WRITE_MANIFEST, WRITE_MANIFEST)
    for check in (check_retention, check_fallback_is_not_pushed_out, check_missing_and_extra_files, check_full_disk):
        check(code, tmp_path / check.__name__)


def test_the_directories_of_the_best_and_the_last(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    assert store.best_and_last() == {}
    for step, best in ((1, True), (2, False), (3, False)):
        store.begin_save(step, {"model": {"w": torch.zeros(1)}}, {}, best=best)
    assert {name: path.name for name, path in store.best_and_last().items()} == {
        "best": "step-00000001",
        "last": "step-00000003",
    }
