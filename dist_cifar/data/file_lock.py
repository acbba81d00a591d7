"""Lets one process at a time through, per file system.

Contract: `exclusive` holds the lock of a file for a `with` block. Choosing one rank would not do: the ranks of one node
share its disk, those of two nodes may or may not, and two jobs know nothing of each other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from dist_cifar.data.ownership import FOLDER_MODE
from dist_cifar.errors import DataError

logger = logging.getLogger(__name__)


@contextmanager
def exclusive(path: Path, *, key: str, doing: str) -> Iterator[None]:
    """Holds the lock of the file `path`, which is created, with its folder, if it is missing.

    Logs a line before it waits; `doing` says what the holder of the lock does. Raises `DataError`, which names the
    config key `key`, where no lock can be had. The lock ends with the process, however that ends.
    """
    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info(f"waiting for another process, which is {doing} (it holds {path})")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise DataError(
            f"{path.parent}: cannot be written and locked ({error}); set {key} to a directory where it can"
        ) from None
    try:
        yield
    finally:
        lock.release()
