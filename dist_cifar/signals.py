"""Signals that ask the run to stop set a flag and do nothing else.

Contract: after `install`, SIGTERM, SIGUSR1 and SIGINT make `stop_requested` true; further signals change nothing. The
training loop looks at the flag between steps. Install before torch is imported: a signal may come early.
"""

from __future__ import annotations

import signal

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_received: list[signal.Signals] = []


def install() -> None:
    """Puts the handlers in place. Main thread only."""
    for number in _SIGNALS:
        signal.signal(number, lambda received, frame: _received.append(signal.Signals(received)))


def stop_requested() -> bool:
    """Whether one of the signals has come."""
    return bool(_received)


def first_received() -> str:
    """Name of the signal that came first, e.g. `SIGTERM`; only after `stop_requested`."""
    return _received[0].name
