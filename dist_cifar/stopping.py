"""What stops a run before it is done: a signal, or the end of the job's time.

Contract: after `install`, SIGTERM, SIGUSR1 and SIGINT make `stop_requested` true and do nothing else; further signals
change nothing. The training loop asks between steps. Install the handlers before torch is imported: a signal may come
early. The end of the job's time is fixed when the process starts and measured by the monotonic clock: setting the wall
clock does not move it. When a launcher dies, its ranks are killed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
"""From Linux's <sys/prctl.h>."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_received: list[signal.Signals] = []


def install() -> None:
    """Installs the signal handlers. Main thread only."""
    for number in _SIGNALS:
        signal.signal(number, lambda received, frame: _received.append(signal.Signals(received)))


def die_with_launcher() -> None:
    """Has this process killed when its parent dies, from now on. Linux only; elsewhere it does nothing.

    torchrun starts its ranks in sessions of their own: the ranks of an agent that was killed would continue beside
    those of the job that is started in its place.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)


def stop_requested() -> bool:
    """Whether one of the signals has been received."""
    return bool(_received)


def first_received() -> str:
    """The name of the signal that was received first, e.g. `SIGTERM`; only after `stop_requested`."""
    return _received[0].name


# --- the end of the job's time -----------------------------------------------------------------------------------

_RESERVE_SECONDS = 15.0
"""Reserved for the end of the processes, and for the checkpoint of a process that has not written one yet."""
_INTERVALS = 2
"""How many times the longest interval so far is reserved: one until the next time that it is asked, and one for the
step that ranks still take when one of them wants to stop."""
_WRITES = 3
"""How many times a checkpoint's write is reserved: one may be under way when the run stops, and the last one follows it
and may take twice as long, since a shared disk is slow when many jobs end."""


def seconds_left(environ: Mapping[str, str], time_limit_seconds: float | None, *, wall_time: float) -> float | None:
    """Seconds until the job is ended: by the config's limit or by SLURM, whichever is sooner; None without either.

    `wall_time` is the time now in seconds since 1970, in which SLURM gives its SLURM_JOB_END_TIME. An end that is past
    when the job starts cannot be its own.
    """
    ends = [] if time_limit_seconds is None else [time_limit_seconds]
    end_time = environ.get("SLURM_JOB_END_TIME", "")
    if end_time.isdecimal() and int(end_time) > wall_time:
        ends.append(int(end_time) - wall_time)
    elif end_time.isdecimal():
        logger.warning(
            "warning: SLURM_JOB_END_TIME=%s is past, as in a shell that has outlived its job: it is ignored", end_time
        )
    return min(ends, default=None)


class Deadline:
    """The end of the job's time; the loop asks it once a step whether another step may still begin."""

    def __init__(self, seconds: float | None) -> None:
        """The job ends `seconds` from now, or never if that is None."""
        self._asked = time.monotonic()
        self._end = None if seconds is None else self._asked + seconds
        self._longest = 0.0

    def is_near(self, write_seconds: float) -> bool:
        """Whether another step, and a checkpoint whose write takes `write_seconds` in the background, may not fit.

        A step is assumed to take the longest interval between two calls so far, with all that happened in it.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._asked)
        self._asked = now
        margin = _INTERVALS * self._longest + _WRITES * write_seconds + _RESERVE_SECONDS
        return self._end is not None and now + margin >= self._end
