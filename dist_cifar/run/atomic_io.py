"""Atomic and durable file operations: the one place that writes, renames and deletes what must survive a crash.

Contract: when `write_atomic` or `move` returns, its effect is on the disk, not only in the page cache; a process that
is killed inside it leaves either the state before or the state after, and at most a temporary file. Errors are
`OSError`s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path

_NAME_CHARACTERS = 40
"""How much of a file's name its temporary file shows: with the rest it must not be too long for a disk."""
_OPEN_FILES = re.compile(r"/dev/(?P<name>stdin|stdout|stderr)|/(?:dev|proc/self)/fd/(?P<number>\d+)", re.ASCII)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces the content of `path` as a whole; text is UTF-8.

    The temporary file beside it has a name that no other writer has: several may write to one path at the same time,
    and the last one counts. A device, a pipe or a folder is not replaced: that is an error.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "Not a regular file, and not replaced by one", os.fspath(path))
    temporary = path.with_name(f".tmp-{path.name[:_NAME_CHARACTERS]}-{secrets.token_hex(4)}")
    try:
        write_file(temporary, data.encode() if isinstance(data, str) else data)
        move(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_output(path: Path, data: bytes | str) -> None:
    """Writes a file that a person has named: what is not a regular file is written through, never replaced.

    A link keeps its place, and its target is written; a device or a pipe takes the bytes; `/dev/stdout` and `/dev/fd/N`
    are the open file itself, after what it holds.
    """
    data = data.encode() if isinstance(data, str) else data
    open_file = _OPEN_FILES.fullmatch(os.fspath(path))
    if open_file:
        named = open_file["name"]
        _write_all(int(open_file["number"] or ("stdin", "stdout", "stderr").index(named)), data)
    elif path.exists() and not path.is_file():
        descriptor = os.open(path, os.O_WRONLY)
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)
    else:
        write_atomic(Path(os.path.realpath(path)) if path.is_symlink() else path, data)


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Writes and syncs the content of a file, its parts one after the other.

    The name of a new file lasts only once `fsync_dir` has synced its directory.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for part in parts:
            _write_all(descriptor, part)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:  # one call writes 2 GiB at most
        rest = rest[os.write(descriptor, rest) :]


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
