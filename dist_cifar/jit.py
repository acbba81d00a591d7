"""The project's one way to compile: numba, without the GIL, with the machine code cached on disk.

Contract: `compiled` releases the GIL, rounds as IEEE 754 says (no `fastmath`) and caches beside the package, or in the
user's cache directory if the package is read-only, or in NUMBA_CACHE_DIR if that is set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

inlined: Any = numba.njit(nogil=True)
"""For helpers that only compiled functions call; they are cached with their callers."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles `function` on its first call, or loads it from the cache. Call it with one set of types only.

    numba notices no change of another module: helpers and constants must stand in the module of `function`.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no directory can be written: compile in every process
        return inlined(function)
