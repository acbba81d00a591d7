"""Prepares batches in a thread while the device computes.

Contract: batches come in the order of their steps, on the device of the loop. A GPU fills a batch on a side stream; the
loop's stream waits for that, the loop does not. An error of the thread is raised in the loop that waits for its batch;
leaving the loop, also by an error, ends the thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch

from dist_cifar.ops.transfer import upload

_PREFETCHED_BATCHES = 2
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of the global batch of a step."""

    inputs: torch.Tensor
    """float32 [n, 3, r, r], channels-last, normalised; r is 32 but in a phase of `augment.resolution`."""
    labels: torch.Tensor
    """int64 [n]; of a mixed batch float32 [n, classes], the shares of the classes."""
    filled: torch.cuda.Event | None = None
    """On a GPU, the event of the side stream after which both may be read."""


def prefetch(make: Callable[[int], Batch], steps: range, device: torch.device = _CPU) -> Generator[Batch, None, None]:
    """`make(step)` for each of `steps`, in order, on `device`, a bounded number of batches ahead of the caller.

    For a GPU, `make` may leave a tensor on the CPU or fill it there on the current stream. Close the generator
    (`contextlib.closing`) to end its thread before the steps are over.
    """
    if device.type == "cuda":
        make = _on_side_stream(make, device)
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
        # A thread that uses OpenMP has workers of its own. With more of them than cores, all workers sleep where they
        # wait, those of the loop too (`benchmarks/suite/settings.py` measures what that costs).
        torch.set_num_threads(1)
        try:
            if device.type == "cuda":  # or its GPU is number 0 whenever it leaves a stream, where it takes memory
                torch.cuda.set_device(device)
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
            if item.filled is not None:
                _hand_over(item, item.filled, torch.cuda.current_stream(device))
            yield item
    finally:
        stop.set()
        thread.join()


def _on_side_stream(make: Callable[[int], Batch], device: torch.device) -> Callable[[int], Batch]:
    stream = torch.cuda.Stream(device)

    def make_there(step: int) -> Batch:
        with torch.cuda.stream(stream):
            batch = make(step)
            inputs, labels = upload(batch.inputs, device), upload(batch.labels, device)
            return Batch(inputs=inputs, labels=labels, filled=stream.record_event())

    return make_there


def _hand_over(batch: Batch, filled: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """Lets `stream` read the batch once it is filled, and keeps its memory from the side stream until it has."""
    stream.wait_event(filled)
    for tensor in (batch.inputs, batch.labels):
        tensor.record_stream(stream)
