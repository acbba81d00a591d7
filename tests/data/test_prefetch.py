"""The prefetching thread: order, errors, shutdown."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest
import torch

from dist_cifar.data import prefetch as prefetch_module
from dist_cifar.data.prefetch import Batch, prefetch


def make(step: int) -> Batch:
    return Batch(inputs=torch.tensor([float(step)]), labels=torch.tensor([step]))


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_batches_come_in_order_and_the_thread_ends():
    assert [int(batch.labels) for batch in prefetch(make, range(3, 20))] == list(range(3, 20))
    assert prefetch_threads() == 0
    assert list(prefetch(make, range(0))) == []


def test_the_thread_works_ahead_but_not_without_bound():
    made: list[int] = []
    with closing(prefetch(lambda step: made.append(step) or make(step), range(100))) as batches:
        next(batches)
        deadline = time.monotonic() + 10
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert 3 <= len(made) <= 5
    assert prefetch_threads() == 0


def test_an_error_of_the_thread_is_raised_where_its_batch_is_waited_for():
    def fail_at_two(step: int) -> Batch:
        if step == 2:
            raise OSError("disk gone")
        return make(step)

    batches = prefetch(fail_at_two, range(5))
    assert [int(next(batches).labels), int(next(batches).labels)] == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert prefetch_threads() == 0


def test_an_error_in_the_loop_ends_the_thread():
    with pytest.raises(ZeroDivisionError), closing(prefetch(make, range(1000))) as batches:
        for _ in batches:
            raise ZeroDivisionError
    assert prefetch_threads() == 0


def test_only_the_loop_has_several_threads_for_its_operators():
    """More OpenMP workers than cores would all sleep where they wait, and the loop with them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with closing(prefetch(lambda _: make(torch.get_num_threads()), range(3))) as batches:
            assert [int(batch.labels) for batch in batches] == [1, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_thread_works_on_the_gpu_of_its_rank(monkeypatch):
    """Else its device is GPU 0, on which leaving a stream then makes a context of every rank."""
    device, calls = torch.device("cuda", 3), []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda chosen: calls.append((chosen, threading.current_thread().name))
    )
    monkeypatch.setattr(prefetch_module, "_on_side_stream", lambda make, device: calls.append("made") or make)
    assert len(list(prefetch(make, range(2), device))) == 2
    assert calls == ["made", (device, "prefetch")]
