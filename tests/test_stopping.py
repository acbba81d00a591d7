"""The end of the job's time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dist_cifar import stopping
from dist_cifar.stopping import Deadline, seconds_left
from tests import PATIENCE_SECONDS, REPOSITORY


@pytest.mark.parametrize(
    ("environ", "limit", "expected"),
    [
        ({}, None, None),
        ({}, 30.0, 30.0),
        ({"SLURM_JOB_END_TIME": "1100"}, None, 100.0),
        ({"SLURM_JOB_END_TIME": "1100"}, 30.0, 30.0),
        ({"SLURM_JOB_END_TIME": "1010"}, 30.0, 10.0),
        ({"SLURM_JOB_END_TIME": "Unknown"}, None, None),
        ({"SLURM_JOB_END_TIME": "²"}, None, None),
        ({"SLURM_JOB_END_TIME": "900"}, None, None),
        ({"SLURM_JOB_END_TIME": "900"}, 30.0, 30.0),
    ],
)
def test_the_nearer_end_counts(environ, limit, expected):
    assert seconds_left(environ, limit, wall_time=1000.0) == expected


def test_an_end_that_is_past_at_the_start_is_ignored_with_a_warning(caplog):
    assert seconds_left({"SLURM_JOB_END_TIME": "999"}, None, wall_time=1000.0) is None
    assert "SLURM_JOB_END_TIME=999 is past" in caplog.text


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, to be set; the wall clock raises."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(stopping, "time", clock)
    return clock


def check_intervals(clock):
    clock.now = 0.0
    end = Deadline(100.0)
    clock.now = 1.0
    assert not end.is_near(0.0, delay=0)
    clock.now = 21.0  # an evaluation: 20 seconds
    assert not end.is_near(0.0, delay=0)
    clock.now = 40.0
    assert not end.is_near(0.0, delay=0)
    clock.now = 44.9
    assert not end.is_near(0.0, delay=0)
    clock.now = 45.1  # 54.9 left, 2 x 20 and the reserve of 15 do not fit
    assert end.is_near(0.0, delay=0)


def test_what_comes_before_the_first_step_is_no_step(clock):
    clock.now = 0.0
    end = Deadline(100.0)
    clock.now = 60.0
    end.begin()
    clock.now = 61.0
    assert not end.is_near(0.0, delay=6)  # 39 left; eight steps of a second and the reserve of 15


def check_writes(clock):
    """Steps of a second; from the 11th on the disk has become slow."""
    clock.now = 0.0
    end = Deadline(200.0)
    for _ in range(10):
        clock.now += 1.0
        assert not end.is_near(5.0, delay=0)
    clock.now = 11.0
    assert not end.is_near(55.0, delay=0)  # 189 left; 2 x 1, 3 x 55 and 15 are 182
    assert end.is_near(58.0, delay=0)  # 191
    assert not end.is_near(1.0, delay=0)  # that it was slow once does not count for ever
    for now in range(12, 168):
        clock.now = float(now)
        assert not end.is_near(5.0, delay=0)
    assert end.is_near(5.0, delay=1)  # 33 left, and ranks that hear of it a step later
    clock.now = 168.0  # 32 left; 2 x 1, 3 x 5 and 15 fill them
    assert end.is_near(5.0, delay=0)


def test_twice_the_longest_interval_is_kept_in_reserve(clock):
    check_intervals(clock)


def test_three_times_the_write_of_a_checkpoint_is_kept_in_reserve(clock):
    check_writes(clock)


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [("_WRITES", 0, check_writes), ("_WRITES", 2, check_writes), ("_INTERVALS", 1, check_intervals)],
)
def test_a_smaller_margin_is_caught(clock, monkeypatch, name, value, check):
    monkeypatch.setattr(stopping, name, value)
    with pytest.raises(AssertionError):
        check(clock)


def test_no_end_is_never_near(clock):
    end = Deadline(None)
    clock.now = 1e9
    assert not end.is_near(0.0, delay=0)


# --- signals -----------------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
from dist_cifar import stopping
stopping.GRACE_SECONDS = 0.3
if "nohup" in sys.argv: signal.signal(signal.SIGHUP, signal.SIG_IGN)
stopping.install()
number = getattr(signal, sys.argv[1])
def send(times=1):
    for _ in range(times): os.kill(os.getpid(), number)
try:
    if "deferred" in sys.argv:
        stopping.defer(); send(10)
        if "at_once" in sys.argv:
            with stopping.at_once(): print("not here")
        print(stopping.stop_requested(), stopping.first_received()); sys.exit(0)
    if "stuck" in sys.argv:
        if os.fork() == 0: time.sleep(0.2); os.kill(os.getppid(), number); os._exit(0)
        import ctypes
        while True: ctypes.CDLL(None).select(0, None, None, None, None)
    if "forked" in sys.argv:
        if os.fork() == 0: send(); time.sleep(10)
        code = os.waitstatus_to_exitcode(os.wait()[1]); print(code, stopping.stop_requested()); sys.exit(0)
    if "half_made" in sys.argv:
        class HalfMade:
            def __init__(self): send(); self.whole = True
            def __del__(self): assert self.whole
        HalfMade()
    send()
    print("goes on")
except stopping.Stopped as stop:
    send(3)
    stopping.report(stop)
    sys.exit(stop.exit_code)
"""
LINE = "dist_cifar: stopped by {}; nothing was lost, run it again\n"


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        *[([name], 75, "", LINE.format(name)) for name in ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")],
        (["SIGINT"], 130, "", LINE.format("SIGINT")),
        (["SIGHUP", "nohup"], 0, "goes on\n", ""),
        (["SIGTERM", "deferred"], 0, "True SIGTERM\n", ""),
        (["SIGTERM", "deferred", "at_once"], 75, "", LINE.format("SIGTERM")),
        (["SIGTERM", "stuck"], 75, "", LINE.format("SIGTERM")),
        (["SIGTERM", "forked"], 0, "-15 False\n", ""),
        (["SIGTERM", "half_made"], 75, "", LINE.format("SIGTERM")),
    ],
)
def test_every_signal_ends_the_process_or_is_deferred(arguments, code, out, err):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


@pytest.mark.parametrize("program", [["-m", "dist_cifar"], [str(REPOSITORY / "dist_cifar/train.py")]])
def test_a_signal_during_the_imports_is_one_line(tmp_path, program):
    """It comes from a module that is imported before the command line is."""
    (tmp_path / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGUSR2)\n")
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    done = subprocess.run(
        [sys.executable, *program], capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=environ
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, "", LINE.format("SIGUSR2"))
