"""What the tests of the checkpoints share: a disk on which everything can go wrong, and mutants of the code.

The checks are functions of the code under test. Each is run on the store itself, where it must hold, and on mutants
of it, where it must fail: a check that no mutant fails would prove nothing. Where a check needs a write to be under
way it holds the writing thread at a gate, and nothing depends on how long anything takes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dist_cifar.errors import CheckpointError
from dist_cifar.run import atomic_io, checkpoint
from dist_cifar.run.checkpoint import CheckpointStore, weights_sha256
from dist_cifar.tracking.console import LineHandler
from tests import PATIENCE_SECONDS, REPOSITORY


@dataclass(frozen=True)
class Code:
    """The code under test: the modules as imported, or a mutant of them."""

    checkpoint: ModuleType = checkpoint
    atomic_io: ModuleType = atomic_io

    def store(self, directory: Path, keep_last: int = 1, **options: Any) -> tuple[CheckpointStore, list[str]]:
        said = _Lines()
        _open_lines.append(weakref.ref(said))
        return self.checkpoint.CheckpointStore(directory, keep_last=keep_last, **options), said


REAL = Code()


class _Lines(list[str]):
    """The lines that were logged since a store was made, for as long as somebody holds them."""


_open_lines: list[weakref.ref[_Lines]] = []


def _take_line(line: str) -> None:
    _open_lines[:] = [reference for reference in _open_lines if reference() is not None]
    for reference in _open_lines:
        lines = reference()
        if lines is not None:
            lines.append(line)


logging.getLogger(checkpoint.__name__).addHandler(LineHandler(_take_line))
logging.getLogger(checkpoint.__name__).setLevel(logging.INFO)


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
    before, code.atomic_io.os = code.atomic_io.os, disk
    try:
        yield disk
    finally:
        code.atomic_io.os = before


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


def check_state(code: Code, directory: Path, newest: set[int | None], best: set[int | None]) -> None:
    """A fresh store loads one of the marks, without a complaint, and all that calls itself a checkpoint is good."""
    store, said = code.store(directory)
    assert mark_of(store.load_newest()) in newest
    assert mark_of(store.load_best()) in best
    assert said == []
    for path in directory.glob("step-*"):
        code.checkpoint.read_checkpoint(path)


RULES = {"keep_last": 1, "keep_best": 2, "keep_every_steps": 20}


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


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


# --- mutants ----------------------------------------------------------------------------------------------------


def mutant(module: str, old: str, new: str) -> Code:
    """The code with one passage replaced."""
    modules = {}
    for name, real in (("atomic_io", atomic_io), ("checkpoint", checkpoint)):
        source = Path(real.__file__).read_text(encoding="utf-8")
        if name == module:
            assert source.count(old) == 1, f"the passage occurs {source.count(old)} times: {old}"
            source = source.replace(old, new)
        modules[name] = ModuleType(real.__name__)
        exec(compile(source, f"mutant of {real.__file__}", "exec"), modules[name].__dict__)
    modules["checkpoint"].atomic_io = modules["atomic_io"]
    return Code(**modules)


def assert_caught(root: Path, check: Callable[[Code, Path], object], module: str, old: str, new: str) -> None:
    """`check` fails on the code of `module` (`checkpoint` or `atomic_io`) with the passage `old` replaced by `new`."""
    code = mutant(module, old, new)
    with pytest.raises((AssertionError, CheckpointError, OSError, ZeroDivisionError, pytest.fail.Exception)):
        check(code, root)
