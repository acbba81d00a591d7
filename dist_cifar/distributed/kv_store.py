"""A key-value store that the processes of one job share without a process group.

Contract: a value that `set` has stored is found by every later `get` of any process. `get` does not wait. With one
process the values stay in that process, and torch is not imported. It is not for tensors: a value is a line of text.
"""

from __future__ import annotations

from typing import Any

from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.distributed.timeouts import Timeouts
from dist_cifar.errors import LaunchError

_TIMEOUTS = Timeouts(run_seconds=300.0)
"""No config says how long these processes wait for one another."""


class KeyValueStore:
    """A key-value store. With several processes all of them construct it, and rank 0 hosts it."""

    def __init__(self, env: DistEnv) -> None:
        """Raises `LaunchError` if not all processes connect."""
        self._values: dict[str, str] = {}
        self._store: Any = None
        self._where = env.master_addr
        if env.world_size == 1:
            return
        from dist_cifar.distributed.rendezvous import open_store

        try:
            self._store = open_store(env, _TIMEOUTS)
        except RuntimeError as error:
            raise self._lost(error) from error

    def set(self, key: str, value: str) -> None:
        """Stores the value of a key. Raises `LaunchError` if the job is gone."""
        if self._store is None:
            self._values[key] = value
            return
        try:
            self._store.set(key, value)
            self._store.check([key])  # `set` does not wait for an answer; answers come in order
        except RuntimeError as error:
            raise self._lost(error) from error

    def get(self, key: str) -> str | None:
        """Returns the value of a key; None while there is none. Raises `LaunchError` if the job is gone."""
        if self._store is None:
            return self._values.get(key)
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> LaunchError:
        return LaunchError(
            f"launch: the other processes cannot be reached at {self._where} ({' '.join(str(error).split())[:200]});"
            " the first of them has ended"
        )
