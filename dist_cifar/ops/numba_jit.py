"""The project's one way to compile: numba, without the GIL, with the machine code cached on disk.

Contract: `compiled` releases the GIL, rounds as IEEE 754 says (no `fastmath`) and caches beside the package, or in the
user's cache directory if the package is read-only, or in NUMBA_CACHE_DIR if that is set. `load` and `warm_up` do before
the first step what it would otherwise wait for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numba
from numba.core import event

from dist_cifar.file_lock import exclusive

logger = logging.getLogger(__name__)

inlined: Any = numba.njit(nogil=True)
"""Decorates helpers that only compiled functions call; they are cached with their callers."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles `function` on the first call with arguments of some types, or loads it from the cache.

    numba notices no change of another module: helpers and constants must stand in the module of `function`.
    """
    if _has_no_home():
        return inlined(function)
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no directory can be written: compile in every process
        return inlined(function)


def _has_no_home() -> bool:
    """Whether numba would cache in a folder called `~`, because it has no other place and this user has no home."""
    has_place = "NUMBA_CACHE_DIR" in os.environ or os.access(Path(__file__).parents[1], os.W_OK)
    return not has_place and os.path.expanduser("~").startswith("~")


def load(use: Callable[[], None]) -> bool:
    """Loads what `use` calls from numba's cache; False if it is not there. Processes may do it in parallel."""
    try:
        with event.install_listener("numba:compile", _Refusal()):
            use()
    except _NotCached:
        return False
    return True


def warm_up(use: Callable[[], None]) -> None:
    """Compiles what `use` calls, or loads it from numba's cache.

    Logs one line before a compilation, and none if the cache is warm. Processes that start together compile one
    after the other: numba's index of the cache does not survive two writers on two kinds of CPU.
    """
    if load(use):
        return
    with ExitStack() as held:
        cache = _nothing.stats.cache_path
        if cache:
            try:
                lock = Path(cache) / "dist_cifar.lock"
                waits = partial(logger.info, "waiting for another process, which compiles kernels (it holds %s)", lock)
                held.enter_context(exclusive(lock, waits=waits))
            except OSError as error:
                reason = error.strerror
                logger.info(f"warning: {cache} cannot be locked ({reason}): processes may compile at the same time")
        held.enter_context(event.install_listener("numba:compile", _Announcer()))
        use()


@compiled
def _nothing() -> None:
    """Does nothing; its statistics tell where the cache of this package is."""


class _NotCached(Exception):
    """Raised where numba was about to compile."""


class _Refusal(event.Listener):
    """Ends a compilation before it begins; numba sends the event when it found nothing in its cache."""

    def on_start(self, compilation: event.Event) -> None:
        raise _NotCached

    def on_end(self, compilation: event.Event) -> None:
        pass


class _Announcer(event.Listener):
    """Logs once that numba compiles."""

    def __init__(self) -> None:
        self._announced = False

    def on_start(self, compilation: event.Event) -> None:
        if not self._announced:
            logger.info("compiling kernels for this machine (once, about 5 s)")
            self._announced = True

    def on_end(self, compilation: event.Event) -> None:
        pass
