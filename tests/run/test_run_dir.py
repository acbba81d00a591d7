"""The run directory: its lock, and who may say that a job has failed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from typing import NoReturn

import pytest

from dist_cifar.config import load_config
from dist_cifar.errors import DataError, LaunchError
from dist_cifar.run.run_dir import RunDir, where_it_lies


def test_one_job_at_a_time(tmp_path, said):
    """Two locks in one process are as those of two: each belongs to its own open file."""
    with RunDir(tmp_path).lock():
        with (
            pytest.raises(LaunchError, match=rf"another job \(host .*, pid {os.getpid()}, since .*\) is using it"),
            RunDir(tmp_path).lock(wait_seconds=0.2),
        ):
            pass
        assert len(said) == 1 and said[0].startswith("waiting up to 0.2 s for another job (host ")
    with RunDir(tmp_path).lock(wait_seconds=0):
        pass
    assert len(said) == 1


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, said):
    def flock(descriptor: int, operation: int) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunDir(tmp_path).lock():
        pass
    assert len(said) == 1 and "cannot be locked (No locks available)" in said[0]


def test_a_job_that_died_without_a_final_status_is_lost(tmp_path):
    run_dir = RunDir(tmp_path)
    with run_dir.lock():
        assert not run_dir.is_lost()  # nothing has begun
        run_dir.write_status("running")
        assert not run_dir.is_lost()
    assert run_dir.is_lost()
    with run_dir.lock(wait_seconds=0):  # looking left no lock behind
        assert not run_dir.is_lost()
    run_dir.write_status("saved")
    assert not run_dir.is_lost()


def test_a_job_that_ends_while_one_looks_is_not_lost(tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path)
    run_dir.write_status("running")
    assert run_dir.is_lost()

    def ends(self: RunDir) -> bool:
        self.write_status("done")
        return False

    monkeypatch.setattr(RunDir, "_is_locked", ends)
    assert not run_dir.is_lost()


def test_of_another_host_it_is_lost_after_a_silence(tmp_path):
    """Its lock may not be seen here."""
    run_dir = RunDir(tmp_path)
    with run_dir.lock():
        run_dir.write_status("running")
    status = run_dir.status() | {"host": "another"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert not run_dir.is_lost()
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 700,) * 2)
    assert run_dir.is_lost()
    (tmp_path / "metrics.jsonl").write_text("")
    assert not run_dir.is_lost()


def test_where_locks_cannot_be_seen_nothing_is_lost(tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path)
    with run_dir.lock():
        run_dir.write_status("running")

    def flock(file: object, operation: int) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert not run_dir.is_lost()


def test_a_failure_that_cannot_be_noted_leaves_no_litter(tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path)
    run_dir.write_status("running")
    status = run_dir.status()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run_dir.write_failure((status["host"], status["pid"]), 0, "the disk is full")
    assert run_dir.status() == status and list(tmp_path.glob(".tmp*")) == []


def test_only_the_first_failure_of_ones_own_job_is_noted(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.write_status("running", step=3)
    status = run_dir.status()
    me = (status["host"], status["pid"])
    run_dir.write_failure((me[0], me[1] + 1), 0, "that of another job")
    assert run_dir.status() == status
    run_dir.write_failure(me, 2, "killed")
    run_dir.write_failure(me, 1, "because of rank 2")
    found = run_dir.status()
    assert (found["status"], found["rank"], found["reason"], found["step"]) == ("failed", 2, "killed", 3)
    run_dir.write_status("done")
    run_dir.write_failure(me, 1, "too late")
    assert run_dir.status()["status"] == "done"


# --- a config.yaml of a person -----------------------------------------------------------------------------------


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("config")}


def test_a_config_that_this_program_wrote_is_replaced(tmp_path):
    for seed in (1, 2):
        RunDir(tmp_path).write_config(load_config(None, [f"run.seed={seed}"]))
    assert list(contents(tmp_path)) == ["config.yaml"]
    assert RunDir(tmp_path).config() == load_config(None, ["run.seed=2"])


@pytest.mark.parametrize("content", [b"# my notes\nrun: {seed: 1}\n", b"", b"\xff", b"# Written by dist_cifar\nx"])
def test_a_config_that_a_person_wrote_is_kept(tmp_path, said, content):
    (tmp_path / "config.yaml").write_bytes(content)
    RunDir(tmp_path).write_config(load_config())
    assert contents(tmp_path).keys() == {"config.yaml", "config.kept.yaml"}
    assert contents(tmp_path)["config.kept.yaml"] == content and RunDir(tmp_path).config() == load_config()
    assert said == [f"warning: {tmp_path}/config.yaml was not written by this program: it is kept as config.kept.yaml"]


def test_an_edited_config_is_kept_each_time(tmp_path, said):
    for n in (1, 2):
        RunDir(tmp_path).write_config(load_config())
        (tmp_path / "config.yaml").write_text((tmp_path / "config.yaml").read_text() + f"# edit {n}\n")
    RunDir(tmp_path).write_config(load_config())
    kept = contents(tmp_path)
    assert kept["config.kept.yaml"].endswith(b"# edit 1\n") and kept["config.kept-2.yaml"].endswith(b"# edit 2\n")
    assert len(kept) == 3 and len(said) == 2


def test_a_link_to_a_persons_config_is_kept(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.yaml").write_text("run: {seed: 1}")
    (tmp_path / "run/config.yaml").symlink_to("../mine.yaml")
    RunDir(tmp_path / "run").write_config(load_config())
    assert (tmp_path / "mine.yaml").read_text() == "run: {seed: 1}" == (tmp_path / "run/config.kept.yaml").read_text()


# --- locks that cannot be trusted ----------------------------------------------------------------------------------


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP", "always"])
def no_locks(request, monkeypatch):
    def flock(file: object, operation: int) -> None:
        if request.param != "always":
            raise OSError(getattr(errno, request.param), request.param)

    monkeypatch.setattr(fcntl, "flock", flock)


def running(run_dir: RunDir, **facts: object) -> None:
    run_dir.open()
    run_dir.write_status("running", step=1)
    status = run_dir.status() | facts
    (run_dir.path / "status.json").write_text(json.dumps(status))


def test_a_living_job_of_this_host_is_seen_from_its_status(tmp_path, no_locks, said):
    run_dir = RunDir(tmp_path / "run")
    running(run_dir, pid=os.getppid())
    with pytest.raises(LaunchError, match=f"another job .*pid {os.getppid()}.* is using it"), run_dir.lock():
        pass
    assert len(said) == 1 and "cannot be locked" in said[0]


@pytest.mark.parametrize("facts", [{"pid": 2**22 + 1}, {"time": 1.0}, {"status": "saved"}, {"status": None}])
def test_a_dead_job_of_this_host_is_not_waited_for(tmp_path, no_locks, facts):
    run_dir = RunDir(tmp_path / "run")
    running(run_dir, **{"pid": os.getppid()} | facts)
    with run_dir.lock():
        pass


def test_a_job_of_another_host_is_alive_while_it_writes(tmp_path, no_locks):
    run_dir = RunDir(tmp_path / "run")
    running(run_dir, host="another", pid=1)
    with run_dir.lock(wait_seconds=0.2):
        pass
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.02):
            (run_dir.path / "metrics.jsonl").write_text("x")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with pytest.raises(LaunchError, match="host another, pid 1"), run_dir.lock(wait_seconds=0.5):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/run", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="cannot be written"), RunDir(path).lock():
            pass


# --- moved and copied ----------------------------------------------------------------------------------------------


def begun(path) -> RunDir:
    run_dir = RunDir(path)
    run_dir.open()
    config = load_config(None, [f"run.dir={path}"])
    run_dir.write_config(config)
    start = {"total_steps": 4, "steps_per_epoch": 2, "world_size": 2, "host": "h", "device": "cpu", "strategy": "exact"}
    run_dir.append_event("started", step=0, **start)
    run_dir.write_status("saved", step=1)
    return run_dir


def test_a_copy_knows_its_original_and_a_moved_run_has_none(tmp_path):
    original = begun(tmp_path / "a")
    assert original.copied_from() is None
    copy = RunDir(shutil.copytree(tmp_path / "a", tmp_path / "b"))
    assert copy.copied_from() == str(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert RunDir(tmp_path / "link").copied_from() is None
    shutil.rmtree(tmp_path / "a")
    assert copy.copied_from() is None  # moved
    time.sleep(0.01)
    begun(tmp_path / "a")  # another run where the original was
    assert copy.copied_from() is None
    copy.write_status("saved")
    assert copy.copied_from() is None


def test_a_run_continues_where_it_lies(tmp_path, said):
    begun(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b/config.yaml"
    config = load_config(file)
    assert where_it_lies(config, file, []).run.dir == str(tmp_path / "b")
    assert len(said) == 1 and "was moved or copied" in said[0]
    assert where_it_lies(config, file, ["run.dir=c"]) is config
    (tmp_path / "b/events.jsonl").unlink()  # a person's own config in a folder
    assert where_it_lies(config, file, []) is config and where_it_lies(config, None, []) is config
