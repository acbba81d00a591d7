"""Accelerate's private parts that this package uses, all in one place.

Contract: only an undocumented attribute of Accelerate's tells whether a process has a `PartialState`, and only an
undocumented method removes it. pyproject.toml bounds the version: `accelerate>=1.10,<2`.
`tests/tracking/test_accelerate_private.py` fails where a version changes what is used here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_COUNTED_BY = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""The variables from which Accelerate learns that there are other processes."""


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
    hidden = {name: os.environ.pop(name) for name in _COUNTED_BY if name in os.environ}
    try:
        PartialState(cpu=True)
    finally:
        os.environ.update(hidden)
    try:
        yield
    finally:
        PartialState._reset_state()  # a strategy of this process may yet want its own
