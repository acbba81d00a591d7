"""Whether all ranks of a job run the same thing: the same config, the same packages, the same data.

Contract: what the ranks run is given as facts, a flat mapping of names to values that JSON can write. Ranks whose facts
differ are told apart by name, rank and value, on every rank, before any of them does anything with the difference. With
equal facts the exchange costs two small messages a rank.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dist_cifar.distributed.failure_detector import odd_ranks
from dist_cifar.errors import LaunchError

Facts = Mapping[str, Any]
_SHOWN = 4
"""How many differences and how many ranks an error lists."""
_READ_SECONDS = 5.0
"""How long rank 0, which hosts the store, waits for the others to read what differs."""


class Store(Protocol):
    """The methods of torch.distributed's store that are used here."""

    def set(self, key: str, value: str) -> None: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def add(self, key: str, amount: int) -> int: ...


def compare_through(store: Store, facts: Facts, *, rank: int, world_size: int) -> None:
    """Raises `LaunchError` on every rank if the ranks' facts differ. Every rank calls it, before there is a group.

    Of equal facts only the digests are exchanged: a job may have a thousand ranks.
    """
    text = json.dumps(facts, sort_keys=True)
    store.set(f"facts/{rank}", text)
    store.set(f"digest/{rank}", hashlib.sha256(text.encode()).hexdigest())
    if len(set(store.multi_get([f"digest/{other}" for other in range(world_size)]))) == 1:
        return
    found = [json.loads(value) for value in store.multi_get([f"facts/{other}" for other in range(world_size)])]
    read, deadline = store.add("read", 1), time.monotonic() + _READ_SECONDS
    while rank == 0 and read < world_size and time.monotonic() < deadline:
        time.sleep(0.05)
        read = store.add("read", 0)
    require_same(found)


def require_same(found: Sequence[Facts]) -> None:
    """Raises `LaunchError`, which names what differs, if not all ranks have found the same facts."""
    names = dict.fromkeys(name for facts in found for name in facts)
    differ = {name: [facts.get(name) for facts in found] for name in names}
    texts = [
        _difference(name, [json.dumps(value, sort_keys=True) for value in values])
        for name, values in differ.items()
        if any(value != values[0] for value in values)
    ]
    if texts:
        more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
        raise LaunchError(
            f"launch: the ranks of this job do not run the same thing: {'; '.join(texts[:_SHOWN])}{more}; start all of"
            " them with the same command, config, installation and data"
        )


def _difference(name: str, values: Sequence[str]) -> str:
    """`run.seed is 1 on rank 1 and 0 on the others`, or each rank's value where there is no majority."""
    odd = odd_ranks(values)
    if len(odd) == len(values):
        shown = [f"{values[rank]} on rank {rank}" for rank in odd[:_SHOWN]]
        return f"{name} is {', '.join(shown)}{', ...' if len(odd) > _SHOWN else ''}"
    most = next(value for rank, value in enumerate(values) if rank not in odd)
    one = values[odd[0]]
    same = [rank for rank in odd if values[rank] == one]
    ranks = ", ".join(map(str, same[:_SHOWN])) + (", ..." if len(same) > _SHOWN else "")
    others = "" if len(same) == len(odd) else f" (others differ too: ranks {', '.join(map(str, odd[:_SHOWN]))}, ...)"
    return f"{name} is {one} on rank{'s' if len(same) > 1 else ''} {ranks} and {most} on most{others}"
