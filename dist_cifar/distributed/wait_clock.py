"""How long the main thread has been waiting for other ranks, in time in which this process ran.

Contract: a pause of the whole job (a suspended job, gang scheduling, a frozen container or machine) adds next to
nothing, while gloo's own timeouts count it. A thread waits while it uses no processor time and stands in a collective:
in this package's, or in code of torch, which runs those of DDP and FSDP. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import FrameType

_PACKAGE = Path(__file__).resolve().parents[1]
_COLLECTIVES = {str(_PACKAGE / "distributed/collectives.py"), str(_PACKAGE / "strategy/reduction_queue.py")}
"""The files whose functions wait for other ranks, directly or for a thread that does."""
_TORCH = f"{os.sep}torch{os.sep}"
_IDLE_SECONDS = 0.001
"""A thread that used more processor time since the last look did not wait all the time."""


class WaitClock:
    """The clock of one thread."""

    def __init__(self, thread: int, longest_tick_seconds: float) -> None:
        """`thread` is its identifier. Looks that are further apart than `longest_tick_seconds` were held up."""
        self._thread, self._longest = thread, longest_tick_seconds
        self._cpu_clock = time.pthread_getcpuclockid(thread)
        self._seen_at, self._cpu, self._place = time.monotonic(), time.clock_gettime(self._cpu_clock), object()
        self._waited = 0.0

    def look(self, place: object) -> float:
        """Returns the seconds of waiting so far. Call it often; `place` is another one in each collective."""
        now, cpu = time.monotonic(), time.clock_gettime(self._cpu_clock)
        waits = place == self._place and cpu - self._cpu < _IDLE_SECONDS
        if waits and stands_in_collective(sys._current_frames().get(self._thread)):
            self._waited += min(now - self._seen_at, self._longest)
        else:
            self._waited = 0.0
        self._seen_at, self._cpu, self._place = now, cpu, place
        return self._waited


def stands_in_collective(frame: FrameType | None) -> bool:
    """Whether a thread whose innermost frame this is may wait for other ranks."""
    if frame is not None and _TORCH in frame.f_code.co_filename:
        return True
    while frame is not None and not frame.f_code.co_filename.startswith(str(_PACKAGE)):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename in _COLLECTIVES
