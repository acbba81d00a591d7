"""The processes of ranks: whether one lives, and that no other process is taken for it or killed in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_cifar.distributed.processes import Identity, RankProcess, own_identity
from tests import PATIENCE_SECONDS

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


@pytest.fixture
def sleep() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a process that does nothing."""
    with contextlib.ExitStack() as started:

        def start() -> subprocess.Popen[bytes]:
            process = started.enter_context(subprocess.Popen(["sleep", "600"]))
            started.callback(process.kill)
            return process

        yield start


def identity_of(process: subprocess.Popen[bytes]) -> Identity:
    return dataclasses.replace(own_identity(), pid=process.pid)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_process_is_seen_as_it_is(sleep):
    process = sleep()
    rank = RankProcess(identity_of(process), seen_from=own_identity())
    assert rank.unhealthy_reason() is None
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: rank.unhealthy_reason() == "its process is stopped")
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: rank.unhealthy_reason() is None)
    process.kill()
    wait_for(lambda: rank.unhealthy_reason() == "its process is gone")  # a zombie
    process.wait()
    assert rank.unhealthy_reason() == "its process is gone"
    assert RankProcess(identity_of(process), seen_from=own_identity()).unhealthy_reason() == "its process is gone"


def test_a_rank_is_killed(sleep):
    process = sleep()
    RankProcess(identity_of(process), seen_from=own_identity()).kill()
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL


@pytest.mark.parametrize("change", [{"boot": "x"}, {"boot": ""}, {"pid_namespace": 1}])
def test_a_process_of_another_kernel_or_namespace_is_let_alone(sleep, change):
    process = sleep()
    rank = RankProcess(dataclasses.replace(identity_of(process), **change), seen_from=own_identity())
    rank.kill()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    assert rank.unhealthy_reason() is None


def test_a_process_that_got_the_number_of_a_rank_is_not_killed(sleep):
    first = sleep()
    rank = RankProcess(identity_of(first), seen_from=own_identity())
    first.kill()
    first.wait()
    time.sleep(2 / os.sysconf("SC_CLK_TCK"))  # the kernel counts the time of a start in ticks
    for _ in range(1000):  # another process may be quicker
        try:
            LAST_PID.write_text(str(first.pid - 1))
        except OSError:  # its mode lets everybody write, and the kernel does not
            pytest.skip("must choose the number of a process: needs root")
        second = sleep()
        if second.pid == first.pid:
            break
        second.kill()
    assert second.pid == first.pid
    assert rank.unhealthy_reason() == "its process is gone"
    rank.kill()
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.2)
    assert RankProcess(identity_of(second), seen_from=own_identity()).unhealthy_reason() is None


def test_the_own_process_has_an_identity():
    me = own_identity()
    assert me.pid == os.getpid() and me.boot and me.pid_namespace
    assert RankProcess(me, seen_from=me).unhealthy_reason() is None
