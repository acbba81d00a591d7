"""The errors that a user can cause or meet, each with the exit code that the command line returns for it.

Contract: an error's message is one line: what was set, what was found, what to do. Any other exception is a defect of
the program and exits with `EXIT_INTERNAL`.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_INTERNAL = 70
EXIT_DATA = 74
EXIT_SAVED = 75
"""Stopped by a signal, everything saved: run the same command again (EX_TEMPFAIL of sysexits.h)."""

EXIT_SIGINT = 130
"""Ended by Ctrl-C before anything was to be saved: what shells expect."""


class UserError(ValueError):
    """An error whose message is meant for whoever typed the command, or wrote the call."""

    exit_code = EXIT_USAGE


class ConfigError(UserError):
    """The configuration or the command line is invalid."""


class LaunchError(UserError):
    """The launcher's variables are missing, contradict each other, or do not match what was started."""


class DataError(UserError):
    """The data set is missing, damaged or hostile."""

    exit_code = EXIT_DATA


class CheckpointError(UserError):
    """A checkpoint cannot be written, or none of those present can be trusted."""

    exit_code = EXIT_DATA


class TrainingError(UserError):
    """The training cannot continue: a loss is not finite, or replicas no longer agree."""

    exit_code = EXIT_INTERNAL

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        """`rank` is the rank at fault, if all ranks raise this error because of one."""
        super().__init__(message)
        self.rank = rank


class RankError(RuntimeError):
    """A rank of the training has failed, with what is no `UserError`, or was killed.

    `launch` raises it for any of its ranks, `train` for another rank than this process. The message has all that is
    known; `rank` is that rank, None if it cannot be told, and `traceback` the text of its traceback, if it has one.
    """

    def __init__(self, message: str, *, rank: int | None, traceback: str = "") -> None:
        """`rank` failed first, None if that cannot be told; `traceback` is that of its exception, empty without one."""
        super().__init__(f"{message}\n\n{traceback}" if traceback else message)
        self.rank, self.traceback = rank, traceback


class StoppedError(UserError):
    """A signal has stopped a training before its first step."""

    exit_code = EXIT_SAVED


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a person who typed `word` most likely meant, if there is one."""
    words = list(known)
    begun = [name for name in words if len(word) > 1 and name.startswith(word)]
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.6) or begun
    return found[0] if len(found) == 1 else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error's message that names the known word nearest to `word`; empty if none is near."""
    meant = nearest(word, known)
    return f"; did you mean {meant}?" if meant else ""


def nearest_path(path: Path, *folders: Path) -> Path | None:
    """The file or folder that a person who typed `path` most likely meant: one beside it, or else in `folders`.

    Names are compared without their extensions, which make `cat.jpg` look like `dog.jpg`.
    """
    beside = path.parent if path.parent.is_dir() or path.parent == path else nearest_path(path.parent)
    for folder in (beside, *folders):
        if folder is None or not folder.is_dir() or not os.access(folder, os.R_OK):
            continue
        by_stem: dict[str, str] = {}
        for entry in sorted(folder.iterdir()):
            if entry.stem not in by_stem or entry.suffix == path.suffix:
                by_stem[entry.stem] = entry.name
        stem = nearest(path.stem, by_stem)
        if stem is not None:
            return folder / by_stem[stem]
    return None


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `1 step`, `1,200 steps`, `0.5 epochs`."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun if number == 1 else plural or noun + 's'}"


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are: `a, b and 3 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


_SYSTEM_ERRORS = {
    getattr(errno, name, None): advice
    for names, advice in (
        ("ENOSPC EDQUOT EFBIG", "free space, or raise the quota or the limit of the size of files, and run again"),
        ("EROFS EACCES EPERM", "give another path, or the right to write there, and run again"),
        ("EMFILE ENFILE ENOMEM EAGAIN", "raise the limit of the system that it names, and run again"),
        ("ENOLCK ENOSYS EOPNOTSUPP", "the disk cannot do that; use another one"),
        (
            "EIO ESTALE ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENOTCONN EREMOTEIO ENXIO ENODEV",
            "",
        ),
    )
    for name in names.split()
}
_OF_A_DISK = "look whether the disk and its server are well, and run again"


def system_error(error: BaseException) -> str | None:
    """The line for an error of the system on a path or a disk, with what to do; None for any other error.

    An error that names a file is one whatever its number is, e.g. a folder that was deleted meanwhile.
    """
    if not isinstance(error, OSError) or isinstance(error, ConnectionError):
        return None
    if error.errno not in _SYSTEM_ERRORS and error.filename is None:
        return None
    return f"{one_line(error)}; {_SYSTEM_ERRORS.get(error.errno) or _OF_A_DISK}"


def out_of_memory(error: BaseException) -> ConfigError | None:
    """The line for memory that Python, numpy or torch asked for in vain, of a GPU too; None for any other error."""
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and is_torchs):
        return None
    return ConfigError(
        f"out of memory: {one_line(error)}; set batch.max_micro_batch to fewer images, or use smaller data, or more"
        " memory"
    )


def one_line(error: BaseException) -> str:
    """The message of another package's error, short enough for a line of the log."""
    return printable(" ".join(str(error).split()))[:300] or type(error).__name__


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor, reverse what stands beside it or be invisible.

    It is shown as Python writes it, e.g. `\\x1b`; tabs and ends of lines stay.
    """
    return "".join(c if c in "\t\n" or c.isprintable() else ascii(c)[1:-1] for c in text)
