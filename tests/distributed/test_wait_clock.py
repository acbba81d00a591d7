"""The clock of the time that a rank waits for other ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from dist_cifar.distributed import wait_clock
from dist_cifar.distributed.wait_clock import WaitClock

LOOK, LIMIT = 0.02, 0.05


@contextmanager
def running(function) -> Iterator[int]:
    """The identifier of a thread that runs `function(end)`, which returns when `end` is set."""
    end = threading.Event()
    thread = threading.Thread(target=function, args=(end,))
    thread.start()
    try:
        time.sleep(LOOK)
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


def looks(
    function,
    collectives: Sequence[object],
    background: Sequence[object] | None = None,
    *,
    seconds: float = LOOK,
    tick: float = 2 * LOOK,
) -> list[bool]:
    """What the clock of a thread that runs `function` says at looks that are `seconds` apart."""
    background = background or [None] * len(collectives)
    with running(function) as thread:
        clock = WaitClock(thread, tick_seconds=tick)
        found = []
        for pair in zip(collectives, background, strict=True):
            found.append(max(clock.look(*pair)) > LIMIT)
            time.sleep(seconds)
    return found


def test_a_thread_that_waits_in_a_collective_is_timed(in_collective):
    found = looks(waits, ["sum"] * 9)
    assert not any(found[:2]) and found[-1]


def test_the_next_collective_begins_anew(in_collective):
    assert not any(looks(waits, ["sum", "vote"] * 5))


def test_one_that_may_take_its_time_is_not_timed(in_collective):
    assert not any(looks(waits, [None] * 9))


def test_a_thread_that_computes_does_not_wait(in_collective):
    assert not any(looks(computes, ["sum"] * 5, seconds=0.2))


def test_a_thread_that_is_idle_elsewhere_does_not_wait_for_other_ranks():
    assert not any(looks(waits, ["sum"] * 9))


def test_what_runs_in_the_background_is_timed_whatever_the_thread_does():
    vote = object()
    assert looks(computes, ["sum"] * 9, [vote] * 9)[-1]
    assert not any(looks(computes, ["sum"] * 9, [object() for _ in range(9)]))


def test_a_pause_counts_as_one_tick(in_collective):
    assert looks(waits, ["sum", "sum"], seconds=10 * LIMIT) == [False, False]
    assert looks(waits, ["sum", "sum"], seconds=10 * LIMIT, tick=20 * LIMIT) == [False, True]


def test_code_of_torch_may_wait(monkeypatch):
    monkeypatch.setattr(wait_clock, "_TORCH", "threading.py")  # the innermost code of `waits`
    assert looks(waits, ["sum"] * 9)[-1]
