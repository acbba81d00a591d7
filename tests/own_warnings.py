"""Finds the warnings in a program's output that are this package's own: those of other packages are not for its tests.

Contract: a warning is this package's if Python attributes it to a line of one of its modules, as it does with a call of
something deprecated. Inside the suite `filterwarnings` of pyproject.toml draws the same line.
"""

from __future__ import annotations

import re
from pathlib import Path

import dist_cifar

_PACKAGE = Path(dist_cifar.__file__).parent
_OWN = re.compile(rf"(?:^|\s)(?:{re.escape(str(_PACKAGE))}|{_PACKAGE.name})/\S*\.py:\d+: \w*Warning\b")


def own_warnings(stderr: str) -> list[str]:
    """The lines of `stderr` in which Python warns of a line of this package."""
    return [line for line in stderr.splitlines() if _OWN.search(line)]
