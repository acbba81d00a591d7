"""Atomic and durable file operations: the one place that writes, renames and deletes what must survive a crash.

Contract: when `write_atomic` or `move` returns, its effect is on the disk, not only in the page cache; a process that
is killed inside it leaves either the state before or the state after. Errors are `OSError`s. One process writes to a
directory at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


def write_atomic(path: Path, data: bytes | str, *, writer: str = "") -> None:
    """Replaces the content of `path` as a whole; text is UTF-8. The temporary file is `.tmp-<name><writer>` beside it.

    Processes that may write to the same path at the same time each give a `writer` of their own.
    """
    temporary = path.with_name(f".tmp-{path.name}{writer}")
    try:
        write_file(temporary, data.encode() if isinstance(data, str) else data)
        move(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Writes and syncs the content of a file, its parts one after the other.

    The name of a new file lasts only once `fsync_dir` has synced its directory.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:  # one call writes 2 GiB at most
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_dir(path: Path) -> None:
    """Syncs a directory, so that the names in it survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: the file system has no such call
            raise
    finally:
        os.close(descriptor)


def make_dirs(path: Path) -> None:
    """Creates a directory and its missing parents, durably."""
    if not path.is_dir():
        make_dirs(path.parent)
        os.mkdir(path)
        fsync_dir(path.parent)


def move(old: Path, new: Path) -> None:
    """Renames within one directory, durably; a file replaces a file, a directory needs a name that is free."""
    os.replace(old, new)
    fsync_dir(new.parent)


def remove_tree(path: Path) -> None:
    """Deletes a file, or a directory with all that it holds. A crash may leave any part of it."""
    if path.is_dir() and not path.is_symlink():
        for name in sorted(os.listdir(path)):
            remove_tree(path / name)
        os.rmdir(path)
    else:
        os.unlink(path)
