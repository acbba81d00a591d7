"""The end of the job's time, early enough to save.

Contract: the end is fixed when the process starts and measured by the monotonic clock: nobody who sets the wall clock
moves it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

_RESERVE_SECONDS = 15.0
"""Left for the last checkpoint and the end of the processes, beside twice the longest interval that was seen."""


def seconds_left(environ: Mapping[str, str], time_limit_seconds: float | None, *, wall_time: float) -> float | None:
    """Seconds until the job is ended, the nearer of the config's limit and SLURM's end time; None where there is none.

    `wall_time` is the time now in seconds since 1970, in which SLURM gives its SLURM_JOB_END_TIME.
    """
    ends = [] if time_limit_seconds is None else [time_limit_seconds]
    end_time = environ.get("SLURM_JOB_END_TIME", "")
    if end_time.isdigit():
        ends.append(int(end_time) - wall_time)
    return min(ends, default=None)


class Deadline:
    """Asked once a step whether another one may still be begun."""

    def __init__(self, seconds: float | None) -> None:
        """`seconds` from now, or None for no end."""
        self._asked = time.monotonic()
        self._end = None if seconds is None else self._asked + seconds
        self._longest = 0.0

    def is_near(self) -> bool:
        """Whether twice the longest interval between two calls, with all that came in it, may not fit any more."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._asked)
        self._asked = now
        return self._end is not None and now + 2 * self._longest + _RESERVE_SECONDS >= self._end
