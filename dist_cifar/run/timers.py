"""Measures how long a rank computes and how much memory it takes."""

from __future__ import annotations

import resource
import time

import torch


class ComputeTimer:
    """Measures the time of each step up to the point where ranks begin to wait for each other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = self._started = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Call at the beginning of a step."""
        if self._device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            self._events.append(events)
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Call where the rank may start to wait for others."""
        if self._device.type == "cuda":
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds of computation since the last call. On a GPU the device must have finished the steps since then."""
        seconds = self._seconds + sum(start.elapsed_time(stop) for start, stop in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return seconds


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: of its GPU, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
