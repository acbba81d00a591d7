"""Accelerate's private parts that this package uses, all in one place.

Contract: only an undocumented attribute of Accelerate's tells whether a process has a `PartialState`, and only an
undocumented method removes it. pyproject.toml bounds the version: `accelerate>=1.10,<2`.
`tests/tracking/test_accelerate_private.py` fails where a version changes what is used here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from dist_cifar.distributed.accelerate_env import without_other_processes


def has_state() -> bool:
    """Whether a strategy has made Accelerate's state of this process."""
    from accelerate.state import PartialState

    return bool(PartialState._shared_state)


@contextmanager
def any_state() -> Iterator[None]:
    """Accelerate's state for a `with` block: the process's own if there is one, else that of a process by itself."""
    from accelerate.state import PartialState

    if has_state():
        yield
        return
    with without_other_processes(os.environ):
        PartialState(cpu=True)
    try:
        yield
    finally:
        PartialState._reset_state()  # a strategy of this process may yet want its own
