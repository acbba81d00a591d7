"""Signals that ask the run to stop set a flag and do nothing else; a launcher that dies takes its ranks along.

Contract: after `install`, SIGTERM, SIGUSR1 and SIGINT make `stop_requested` true; further signals change nothing. The
training loop looks at the flag between steps. Install before torch is imported: a signal may come early.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

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
