"""How long a rank has been waiting for other ranks, in time in which its process ran.

Contract: a pause of the whole job (a suspended job, gang scheduling, a frozen container or machine) adds next to
nothing, while gloo's own timeouts count it. The main thread waits while it uses no processor time and stands in a
collective: in this package's, or in code of torch, which runs those of DDP and FSDP. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import FrameType

_PACKAGE = Path(__file__).resolve().parents[1]
_COLLECTIVES = {
    str(_PACKAGE / path)
    for path in ("distributed/collectives.py", "distributed/dissemination.py", "strategy/reduction_queue.py")
}
"""The files whose functions wait for other ranks, directly or for a thread that does."""
_TORCH = f"{os.sep}torch{os.sep}"
_IDLE_SECONDS = 0.001
"""A thread that used more processor time since the last look did not wait all the time."""


class WaitClock:
    """The time that the main thread waits in one collective, and the time that one in the background takes."""

    def __init__(self, thread: int, *, tick_seconds: float) -> None:
        """`thread` is the main thread's identifier. Of the time between two looks at most `tick_seconds` count."""
        self._thread, self._tick = thread, tick_seconds
        self._cpu_clock = time.pthread_getcpuclockid(thread)
        self._seen_at, self._cpu = time.monotonic(), time.clock_gettime(self._cpu_clock)
        self._seen: tuple[object, object] = None, None
        self._waited = [0.0, 0.0]

    def look(self, collective: object, background: object) -> tuple[float, float]:
        """Returns the seconds so far of the main thread's wait and of what runs in the background. Call it often.

        `collective` is the last one that the main thread has entered, and `background` one that runs beside it; None
        stands for one that may take its time, or for none.
        """
        now, cpu = time.monotonic(), time.clock_gettime(self._cpu_clock)
        is_idle = cpu - self._cpu < _IDLE_SECONDS and stands_in_collective(sys._current_frames().get(self._thread))
        seen = collective if is_idle else None, background
        ran = min(now - self._seen_at, self._tick)
        for i, (before, current) in enumerate(zip(self._seen, seen, strict=True)):
            self._waited[i] = self._waited[i] + ran if current is not None and current == before else 0.0
        self._seen_at, self._cpu, self._seen = now, cpu, seen
        return self._waited[0], self._waited[1]


def stands_in_collective(frame: FrameType | None) -> bool:
    """Whether a thread whose innermost frame this is may wait for other ranks."""
    if frame is not None and _TORCH in frame.f_code.co_filename:
        return True
    while frame is not None and not frame.f_code.co_filename.startswith(str(_PACKAGE)):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename in _COLLECTIVES
