"""When a run has to stop before it is done: a signal, or the end of the job's time.

Contract: after `install`, SIGTERM, SIGUSR1 and SIGINT make `stop_requested` true and do nothing else; further signals
change nothing. The training loop asks between steps. Install before torch is imported: a signal may come early. The end
of the job's time is fixed when the process starts and measured by the monotonic clock: setting the wall clock does not
move it. A launcher that dies takes its ranks along.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping

_PR_SET_PDEATHSIG = 1
"""From Linux's <sys/prctl.h>."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_received: list[signal.Signals] = []


def install() -> None:
    """Puts the handlers in place. Main thread only."""
    for number in _SIGNALS:
        signal.signal(number, lambda received, frame: _received.append(signal.Signals(received)))


def die_with_launcher() -> None:
    """From now on this process is killed when its parent dies. Linux only; elsewhere it does nothing.

    torchrun starts its ranks in sessions of their own: those of an agent that was killed would go on, beside those of
    the job that is started in its place.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)


def stop_requested() -> bool:
    """Whether one of the signals has come."""
    return bool(_received)


def first_received() -> str:
    """Name of the signal that came first, e.g. `SIGTERM`; only after `stop_requested`."""
    return _received[0].name


# --- the end of the job's time -----------------------------------------------------------------------------------

_RESERVE_SECONDS = 15.0
"""Left for the end of the processes, and for the checkpoint of a process that has not written one yet."""
_INTERVALS = 2
"""Times the longest interval that was seen: one until the next time that it is asked, one for the step that ranks still
take when one of them says stop."""
_WRITES = 3
"""Times a checkpoint's write: one may be under way when the stop comes, the last one follows it, and may take twice as
long: it is when many jobs end that a shared disk is slow."""


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

    def is_near(self, write_seconds: float) -> bool:
        """Whether another step, and a checkpoint whose write takes `write_seconds` in the background, may not fit.

        A step is taken for as long as the longest interval between two calls, with all that came in it.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._asked)
        self._asked = now
        margin = _INTERVALS * self._longest + _WRITES * write_seconds + _RESERVE_SECONDS
        return self._end is not None and now + margin >= self._end
