"""Lets one process at a time through, per file system.

Contract: the lock is the kernel's (`flock`), which ends with the process, however that ends; where there is none it is
an error, since a lock that is a mere file would outlive a process that is killed. Choosing one rank would not do: the
ranks of one node share its disk, those of two nodes may or may not, and two jobs know nothing of each other.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path, *, waits: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock of the file `path`, which is created if it is missing, for a `with` block.

    `waits` is called before it waits for another process. Raises `OSError` where no lock can be had.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waits is not None:
                waits()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it the lock
