"""Lets one process at a time write what several share: downloads, decoded images, copies on a node."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dist_cifar.data.ownership import FOLDER_MODE
from dist_cifar.errors import DataError
from dist_cifar.file_lock import exclusive

logger = logging.getLogger(__name__)


@contextmanager
def only_writer(lock: Path, *, key: str, doing: str) -> Iterator[None]:
    """Holds the lock of the file `lock`, which is created, with its folder, if it is missing.

    Logs a line before it waits; `doing` says what the holder of the lock does. Raises `DataError`, which names the
    config key `key`, where no lock can be had.
    """
    with ExitStack() as held:
        try:
            lock.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            held.enter_context(
                exclusive(
                    lock, waits=lambda: logger.info(f"waiting for another process, which is {doing} (it holds {lock})")
                )
            )
        except OSError as error:
            raise DataError(
                f"{lock.parent}: cannot be written and locked ({error.strerror}); set {key} to a directory where it can"
            ) from None
        yield
