"""The thread that writes a checkpoint: its copy, its errors, its memory and its time."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_cifar.errors import CheckpointError
from dist_cifar.run.checkpoint import CheckpointStore, weights_sha256
from dist_cifar.tracking.console import LineHandler
from tests.run.checkpoint_harness import REAL, Code, Disk, assert_caught, mark_of, names, save, tensors_of, using


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
    def write(line: str) -> None:
        raise BrokenPipeError(line)

    logger, handler = logging.getLogger("dist_cifar"), LineHandler(write)
    logger.addHandler(handler)
    try:
        store = CheckpointStore(tmp_path, keep_last=1, on_write_error="warn")
        with using(REAL, Disk(full_at=0)):
            store.begin_save(10, tensors_of(0), {})
            with pytest.raises(BrokenPipeError, match="No space left"):
                store.wait()
    finally:
        logger.removeHandler(handler)


def test_one_copy_in_memory(tmp_path):
    check_memory(REAL, tmp_path)


# --- mutants ----------------------------------------------------------------------------------------------------

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
        "        self.wait()\n        return self._load(self._paths)",
        "        return self._load(self._paths)",
    ),
    "load_best does not wait": (
        check_next_save_waits,
        "checkpoint",
        "        self.wait()\n        return self._load(lambda",
        "        return self._load(lambda",
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
    "two copies": (check_memory, "checkpoint", "return content.data", "return memoryview(content.tobytes())"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(tmp_path, name):
    assert_caught(tmp_path, *MUTANTS[name])
