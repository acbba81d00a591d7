"""Locks between processes: one at a time, gone with a killed holder, and an error in one line where there are none."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from dist_cifar.data.cache_lock import only_writer
from dist_cifar.errors import DataError
from dist_cifar.file_lock import exclusive
from dist_cifar.ops import numba_jit

HOLDER = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1); time.sleep(600)"


def test_it_waits_for_the_holder_and_says_so_and_takes_over_from_one_that_is_killed(tmp_path, said):
    path = tmp_path / "cache" / "images.lock"
    path.parent.mkdir()
    holder = subprocess.Popen([sys.executable, "-uc", HOLDER, path], stdout=subprocess.PIPE)
    holder.stdout.readline()
    events = []

    def waits():
        events.append("waits")
        with pytest.raises(BlockingIOError), open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(holder.pid, signal.SIGKILL)

    with exclusive(path, waits=waits):
        events.append("holds")
        with pytest.raises(BlockingIOError), open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.communicate()
    with exclusive(path, waits=waits), only_writer(path.with_name("other.lock"), key="data.cache_dir", doing="waiting"):
        events.append("holds again")
    assert events == ["waits", "holds", "holds again"] and said == []


def test_who_waits_says_for_what(tmp_path, monkeypatch, said):
    path = tmp_path / "images.lock"
    calls = iter([BlockingIOError(errno.EAGAIN, "in use"), None])

    def flock(descriptor, operation):
        error = next(calls)
        if error is not None:
            raise error

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(path, key="data.cache_dir", doing="decoding the images"):
        assert said == [f"waiting for another process, which is decoding the images (it holds {path})"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_it_is_said_and_no_file_stands_for_one(tmp_path, monkeypatch, said, code):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    message = rf"cannot be written and locked \({os.strerror(code)}\); set data\.cache_dir to a directory"
    for _ in range(2):
        with pytest.raises(DataError, match=message), only_writer(tmp_path / "a.lock", key="data.cache_dir", doing=""):
            raise AssertionError("not reached")
    calls = []
    monkeypatch.setattr(numba_jit, "load", lambda use: False)
    numba_jit.warm_up(lambda: calls.append(1))
    (line,) = said
    assert calls == [1] and f"cannot be locked ({os.strerror(code)}): processes may compile at the same time" in line


def test_a_folder_that_cannot_be_made_is_an_error_of_the_same_kind(tmp_path):
    (tmp_path / "file").touch()
    lock = only_writer(tmp_path / "file" / "a.lock", key="data.cache_dir", doing="")
    with pytest.raises(DataError, match="cannot be written and locked"), lock:
        raise AssertionError("not reached")
