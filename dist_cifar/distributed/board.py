"""Short notes that the processes of one job leave for one another, without a process group.

Contract: a note that `post` has returned from is found by every later `read` of any process. `read` does not wait.
With one process the notes stay in it, and torch is not imported. Not for tensors: a note is a line of text.
"""

from __future__ import annotations

from typing import Any

from dist_cifar.distributed.env import DistEnv
from dist_cifar.errors import LaunchError

_MEETING_SECONDS = 300.0
"""How long the processes of a job wait for the one that keeps the notes."""


class Board:
    """The notes. With several processes all construct it, and rank 0 keeps them."""

    def __init__(self, env: DistEnv) -> None:
        """Raises `LaunchError` if they do not meet."""
        self._notes: dict[str, str] = {}
        self._store: Any = None
        self._where = env.master_addr
        if env.world_size == 1:
            return
        from dist_cifar.distributed.meeting import open_store

        try:
            self._store = open_store(env, _MEETING_SECONDS)
        except RuntimeError as error:
            raise self._lost(error) from error

    def post(self, key: str, note: str) -> None:
        """Leaves a note, in place of an older one with that key. Raises `LaunchError` if the job is gone."""
        if self._store is None:
            self._notes[key] = note
            return
        try:
            self._store.set(key, note)
            self._store.check([key])  # `set` does not wait for an answer; answers come in order
        except RuntimeError as error:
            raise self._lost(error) from error

    def read(self, key: str) -> str | None:
        """The note with that key; None while there is none. Raises `LaunchError` if the job is gone."""
        if self._store is None:
            return self._notes.get(key)
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> LaunchError:
        return LaunchError(
            f"launch: the other processes cannot be reached at {self._where} ({' '.join(str(error).split())[:200]});"
            " the first of them has ended"
        )
