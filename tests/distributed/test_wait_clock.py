"""The clock of the time that a thread waits for other ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dist_cifar.distributed import wait_clock
from dist_cifar.distributed.wait_clock import WaitClock

TICK = 0.02


@contextmanager
def running(function) -> Iterator[int]:
    """The identifier of a thread that runs `function(end)`, which returns when `end` is set."""
    end = threading.Event()
    thread = threading.Thread(target=function, args=(end,))
    thread.start()
    try:
        time.sleep(TICK)
        assert thread.ident is not None
        yield thread.ident
    finally:
        end.set()
        thread.join()


def waits(end: threading.Event) -> None:
    end.wait()


def computes(end: threading.Event) -> None:
    while not end.is_set():
        sum(range(1000))


@pytest.fixture
def in_collective(monkeypatch):
    """This file is one whose functions wait for other ranks."""
    monkeypatch.setattr(wait_clock, "_PACKAGE", __file__)
    monkeypatch.setattr(wait_clock, "_COLLECTIVES", {__file__})


def looks(thread: int, places: list[object], seconds: float = TICK, longest: float = 60.0) -> list[float]:
    clock = WaitClock(thread, longest)
    clock.look(places[0])
    found = []
    for place in places:
        time.sleep(seconds)
        found.append(clock.look(place))
    return found


def test_a_thread_that_waits_in_a_collective_is_timed(in_collective):
    with running(waits) as thread:
        first, second = looks(thread, ["sum", "sum"])
    assert first >= TICK and second >= first + TICK


def test_the_next_collective_begins_anew(in_collective):
    with running(waits) as thread:
        assert looks(thread, ["sum", "vote", "vote"])[1] == 0


def test_a_thread_that_computes_does_not_wait(in_collective):
    with running(computes) as thread:
        assert looks(thread, ["sum"] * 3, seconds=0.2) == [0, 0, 0]


def test_a_thread_that_is_idle_elsewhere_does_not_wait_for_other_ranks():
    with running(waits) as thread:
        assert looks(thread, ["sum"] * 3) == [0, 0, 0]


def test_a_pause_counts_as_one_tick(in_collective):
    with running(waits) as thread:
        assert looks(thread, ["sum", "sum"], seconds=0.3, longest=0.1) == [0.1, 0.2]


def test_code_of_torch_may_wait(monkeypatch):
    monkeypatch.setattr(wait_clock, "_TORCH", "threading.py")  # the innermost code of `waits`
    with running(waits) as thread:
        assert looks(thread, ["sum", "sum"])[1] > 0
