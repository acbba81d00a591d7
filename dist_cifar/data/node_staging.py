"""Copies the decoded data set to each node: once, by one process, for all processes of the node to memory-map.

Contract: `staged` returns arrays equal to those of the cache's entry, or raises `DataError`. A copy appears by a rename
once it is whole, and every process hashes what it is about to use: a copy that is torn or damaged is replaced, never
used. A copy of the same content that is there already is used as it is, from a read-only directory too. Copies are
left where they are for the next job; clusters empty `$SLURM_TMPDIR` themselves.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from pathlib import Path

from dist_cifar.data.arrays import content_sha256
from dist_cifar.data.cache import Entry, read_entry, write_entry
from dist_cifar.data.cache_lock import only_writer
from dist_cifar.data.ownership import own_folder, require_trusted
from dist_cifar.errors import DataError

logger = logging.getLogger(__name__)


def staged(entry: Entry, stage_dir: Path) -> Entry:
    """The entry, memory-mapped from its copy below `stage_dir`; every process of a node may call it at once.

    Logs a line before the copy. Raises `DataError` if there is no good copy and none can be made.
    """
    # Each user's own folder: /dev/shm is everybody's, and nobody can lock or replace the files of another.
    needed = sum(path.stat().st_size for path in entry.directory.iterdir())
    try:
        directory = own_folder(stage_dir, "data.stage_dir") / entry.directory.name
    except OSError as error:
        raise _cannot_copy(stage_dir, needed, error) from None
    copy = _verified(directory, entry)
    if copy is not None:
        return copy
    lock = directory.with_suffix(".lock")
    try:
        lock.touch()
    except OSError as error:
        raise _cannot_copy(stage_dir, needed, error) from None
    with only_writer(lock, key="data.stage_dir", doing="copying the images"):
        copy = _verified(directory, entry)
        if copy is None:
            try:
                logger.info(f"staging {needed / 1e6:.0f} MB to {directory}")
                write_entry(dataclasses.replace(entry, directory=directory))
            except OSError as error:
                raise _cannot_copy(stage_dir, needed, error) from None
            copy = _verified(directory, entry)
    if copy is None:
        raise DataError(
            f"{directory}: the copy does not have the SHA-256 of the data set; delete {entry.directory}, which is then"
            " made again, or set data.stage_dir to another disk"
        )
    return copy


def _verified(directory: Path, entry: Entry) -> Entry | None:
    """The copy in `directory`; None unless it equals `entry` to the last bit.

    Raises `DataError` for one that another user could change afterwards.
    """
    require_trusted(directory, "data.stage_dir")
    copy = read_entry(directory, entry.key)
    if copy is None or content_sha256(copy.arrays) != entry.content_sha256:
        return None
    return dataclasses.replace(entry, directory=directory, arrays=copy.arrays)


def _cannot_copy(stage_dir: Path, needed: int, error: OSError) -> DataError:
    existing = next(path for path in (stage_dir, *stage_dir.absolute().parents) if os.path.exists(path))
    free = shutil.disk_usage(existing).free
    return DataError(
        f"data.stage_dir={stage_dir}: the data set cannot be copied there ({error}; {needed:,} bytes needed,"
        f" {free:,} free); make room, name another directory, or set data.stage_dir=null to read the cache itself"
    )
