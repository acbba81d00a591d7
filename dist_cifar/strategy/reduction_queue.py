"""Reduces buckets of gradients while the backward pass still runs: on a GPU on a stream, on a CPU in a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import nn

from dist_cifar.distributed.collectives import Communicator

BUCKET_BYTES = 8 * 2**20
"""The least size of a bucket but the last: enough to use the bandwidth, small enough to overlap."""


class ReductionQueue:
    """Runs what is submitted, in order, while the computation that submits it continues."""

    def __init__(self, communicator: Communicator) -> None:
        # With one rank there is nothing to wait for, so nothing to hide.
        hides, on_gpu = communicator.world_size > 1, communicator.device.type == "cuda"
        self._stream = torch.cuda.Stream(communicator.device, priority=-1) if hides and on_gpu else None
        # No OpenMP workers of its own, for the reason given in `dist_cifar.data.prefetch`.
        single = partial(torch.set_num_threads, 1)
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="reduce", initializer=single) if hides and not on_gpu else None
        )
        self._futures: list[Future[None]] = []

    def submit(self, function: Callable[[], None]) -> None:
        """Runs `function` once everything that the current stream holds by now is done."""
        if self._thread is not None:
            self._futures.append(self._thread.submit(function))
        elif self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                function()
        else:
            function()

    def wait(self) -> None:
        """Makes what follows see the results. Raises what a function raised."""
        for future in self._futures:
            future.result()
        self._futures.clear()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def partition(parameters: list[nn.Parameter]) -> list[slice]:
    """Cuts `parameters` into slices of at least `BUCKET_BYTES` each, and a last one of what is left."""
    cuts, start, size = [], 0, 0
    for end, parameter in enumerate(parameters, 1):
        size += parameter.nbytes
        if size >= BUCKET_BYTES:
            cuts.append(slice(start, end))
            start, size = end, 0
    if start < len(parameters):
        cuts.append(slice(start, len(parameters)))
    return cuts
