"""Ranks that are not to run the same thing are told so, by name, before they do anything."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest

from dist_cifar.distributed.agreement import compare_through, require_same
from dist_cifar.errors import EXIT_USAGE, LaunchError

SAME = {"run.seed": 0, "optimizer.lr": 0.1, "data.stage": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"run.seed": 1}], r"run.seed is 0 on rank 0, 1 on rank 1; start all of them with the same"),
        ([{}, {}, {"optimizer.lr": 1.0}], r"optimizer.lr is 1.0 on rank 2 and 0.1 on most;"),
        ([{"run.seed": 1}, {"run.seed": 1}, {}, {}, {}], r"run.seed is 1 on ranks 0, 1 and 0 on most;"),
        (
            [{}, {}, {}, {"run.seed": 1}, {"run.seed": 2}],
            r"1 on rank 3 and 0 on most \(others .*: ranks 3, 4, ...\)",
        ),
        ([{}, {}, {"run.seed": 1, "optimizer.lr": 2.0}], r"run.seed is 1 on rank 2 .*; optimizer.lr is 2.0 on rank 2"),
        ([{}, {}, {"new": "x"}], r'new is "x" on rank 2 and null on most'),
        ([{}, {}, {str(i): i for i in range(9)}], r"and 5 more; start"),
        ([{"run.seed": rank} for rank in range(9)], r"0 on rank 0, 1 on rank 1, 2 on rank 2, 3 on rank 3, \.\.\.;"),
    ],
)
def test_what_differs_is_named_with_the_ranks_and_the_values(changes, message):
    with pytest.raises(LaunchError, match=message) as caught:
        require_same([SAME | change for change in changes])
    assert caught.value.exit_code == EXIT_USAGE and "\n" not in str(caught.value)


def test_equal_facts_are_no_error():
    require_same([SAME, dict(SAME)])
    require_same([SAME | {"a": (1, 2)}, SAME | {"a": (1, 2)}])


@dataclasses.dataclass
class MemoryStore:
    """A store within one process."""

    values: dict[str, str] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        with self.changed:
            assert self.changed.wait_for(lambda: all(key in self.values for key in keys), 30)
            return [self.values[key].encode() for key in keys]

    def add(self, key: str, amount: int) -> int:
        with self.changed:
            self.counts[key] = self.counts.get(key, 0) + amount
            return self.counts[key]


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("change", [{}, {"run.seed": 7}])
def test_every_rank_learns_it_through_the_store(world_size, change):
    store, errors = MemoryStore(), [""] * world_size

    def compare(rank: int) -> None:
        facts: dict[str, Any] = SAME | (change if rank == world_size - 1 else {})
        try:
            compare_through(store, facts, rank=rank, world_size=world_size)
        except LaunchError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=compare, args=[rank]) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(errors)) == 1 and ("run.seed is " in errors[0]) == bool(change)
    if change:
        assert store.counts["read"] == world_size  # rank 0, which hosts the store, was the last to go
