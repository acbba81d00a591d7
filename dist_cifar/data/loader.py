"""Ready batches of the training split, prepared in a thread while the device computes.

Contract: the batch of a step is a function of (config, data set, step) and of this rank's slice, never of the time or
of the batches before. An error of the thread is raised in the loop that waits for it; leaving the loop, also by an
error, ends the thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

_PREFETCHED_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of the global batch of a step, on the CPU."""

    inputs: torch.Tensor
    """float32 [n, 3, 32, 32], channels-last, normalised."""
    labels: torch.Tensor
    """int64 [n]."""

    def pinned(self) -> Batch:
        """The same in page-locked memory, from which a GPU copies while it computes."""
        return Batch(inputs=self.inputs.pin_memory(), labels=self.labels.pin_memory())


def prefetch(make: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """`make(step)` for each of `steps`, in order, a bounded number of batches ahead of the caller.

    Close the generator (`contextlib.closing`) to end its thread before the steps are over.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(_PREFETCHED_BATCHES)
    stop = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in steps:
                if stop.is_set():
                    return
                put(make(step))
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
