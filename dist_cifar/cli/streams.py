"""Standard input, output and error: never missing, never a reason for a traceback.

Contract: after `secure`, the three descriptors are open, so that no file of ours takes their numbers; characters that
a terminal or a log cannot show are written as Python writes them (`\\u732b`). Standard error that is lost is lost
quietly. Standard output that is lost ends a command whose result it is: in one line, or quietly if its reader has left.
After `survive_lost_output` it is said once and the process continues: the records of a training are files.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

_survives = False


class OutputError(OSError):
    """Standard output cannot be written: its disk is full, or its terminal is gone."""


def secure() -> None:
    """Opens what is closed, and puts safe streams in the place of Python's own; not of those that a caller has put."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _send_nowhere(number)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the life of the process
    if sys.stdout is sys.__stdout__:
        sys.stdout = _safe(sys.__stdout__, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _safe(sys.__stderr__, 2)


def survive_lost_output() -> None:
    """From now on the process continues without a standard output that is lost."""
    global _survives
    _survives = True


def discard(stream: TextIO) -> None:
    """Sends what is written to a stream from now on nowhere."""
    with contextlib.suppress(OSError, ValueError):  # it has no descriptor
        _send_nowhere(stream.fileno())


def _send_nowhere(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:  # as it is where this was the lowest one that was closed
        os.dup2(null, descriptor)
        os.close(null)


def _safe(stream: TextIO | None, number: int) -> TextIO:
    """A stream on the same descriptor that replaces characters, and copes with the loss of its target."""
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    raw = _Descriptor(number, "w", closefd=False)
    is_unbuffered = bool(getattr(stream, "write_through", False))
    return io.TextIOWrapper(
        raw if is_unbuffered else io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=bool(getattr(stream, "line_buffering", number == 2)),
        write_through=is_unbuffered,
    )


class _Descriptor(io.FileIO):
    """Standard output or error."""

    _is_lost = False

    def write(self, data: Any) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                return self._lose(error, len(data))
            if written is not None:
                return written
            select.select([], [self], [])  # somebody has made it non-blocking

    def _lose(self, error: OSError, size: int) -> int:
        is_output = self.fileno() == 1
        if is_output and not _survives:
            if error.errno == errno.EPIPE:
                raise error
            raise OutputError(error.errno, f"standard output: {error.strerror}; give it another place")
        if not self._is_lost:
            self._is_lost = True
            _send_nowhere(self.fileno())
            if is_output:
                what = f"standard output is lost ({error.strerror}); the run continues and writes its records"
                print(f"dist_cifar: warning: {what}", file=sys.stderr, flush=True)
        return size
