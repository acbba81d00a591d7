"""Colours, where a terminal shows them.

Contract: text for a file, a pipe or a terminal without colours stays as it is (https://no-color.org).
"""

from __future__ import annotations

import os
from typing import TextIO

_COLOURS = {"error": "\x1b[1;31m", "warning": "\x1b[33m"}
_RESET = "\x1b[0m"


def _has_colours(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that shows colours, and the user has not switched them off with `NO_COLOR`."""
    return stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb") and not os.environ.get("NO_COLOR")


def coloured(line: str, stream: TextIO) -> str:
    """The line as `stream` is to show it: `error:` or `warning:` near its beginning stands out."""
    for word, colour in _COLOURS.items():
        before, found, after = line.partition(f"{word}: ")
        if found and before in ("", "dist_cifar: ") and _has_colours(stream):
            return f"{before}{colour}{word}:{_RESET} {after}"
    return line
